"""Interpreter of a PyTorch checkpoint's pickle, without unpickling.

`pickle` calls any function that a file names, hashes any key, and allocates memory for any index.
This interpreter knows only the opcodes that describe dictionaries of tensors. It creates texts,
numbers, tuples, lists, dictionaries and the classes of this file; it calls and imports nothing, and
hashes texts only.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mlx_rgemma.errors import shown

STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""PyTorch's names of the storages of each dtype."""

MAX_OPCODES = 500_000
"""A tensor needs 32; the 9B model, with 628 tensors, 20,000."""

REBUILD = ("torch._utils", "_rebuild_tensor_v2")
ORDERED = ("collections", "OrderedDict")

CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG")
TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
OLD_TEXTS = ("SHORT_BINSTRING", "BINSTRING", "STRING")
ARGUMENTS = frozenset((*INTEGERS, "BINFLOAT", "FLOAT", *TEXTS, *OLD_TEXTS))
"""Opcodes that push their argument."""

PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = frozenset(("PROTO", "FRAME"))


class PickleError(ValueError):
    """A pickle that does not describe tensors."""


class ForbiddenName(PickleError):
    """A pickle that names a function or class that it would run or import."""


@dataclass(frozen=True)
class Global:
    """A name in a pickle; it is never resolved."""

    module: str
    name: str

    @property
    def key(self) -> tuple[str, str]:
        return self.module, self.name


@dataclass(frozen=True)
class Storage:
    """A storage that a pickle describes, not validated."""

    dtype: str
    key: str
    length: int


@dataclass(frozen=True)
class Tensor:
    """A tensor that a pickle describes, not validated."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


def read_pickle(content: bytes) -> Any:
    """Return the value that a pickle describes.

    Raises:
        PickleError: If it has other opcodes, or is too long.
        ValueError: If it is not a pickle.
    """
    machine = _Machine()
    for opcode, argument, _ in islice(pickletools.genops(content), MAX_OPCODES):
        if opcode.name == "STOP":
            return machine.pop()
        machine.run(opcode.name, argument)
    raise PickleError(f"its pickle has more than {MAX_OPCODES:,} opcodes")


class _Machine:
    """The stack, its marks and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Run one opcode."""
        if name in ARGUMENTS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in PUTS:  # a dictionary: an index takes the room of one entry, however large
            self.memo[argument] = self.top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name in GETS:
            if argument not in self.memo:
                raise PickleError(f"its pickle uses the unknown memo {shown(argument)}")
            self.stack.append(self.memo[argument])
        elif name in TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(TUPLES[name])][::-1]))
        elif name == "GLOBAL":
            self.stack.append(_known(*argument.split(" ", 1)))
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in OPCODES:
            OPCODES[name](self)
        elif name not in IGNORED:
            if name == "INST":
                _known(*argument.split(" ", 1))
            raise PickleError(f"its pickle uses the opcode {name}, which tensors do not need")

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleError("its pickle takes more from the stack than it holds")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Pop everything above the last mark."""
        if not self.marks:
            raise PickleError("its pickle misses a mark")
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def tuple_(self) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def list_(self) -> None:
        self.stack.append(self.pop_mark())

    def dict_(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def append(self) -> None:
        self.extend([self.pop()])

    def appends(self) -> None:
        self.extend(self.pop_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise PickleError(f"its pickle appends to a {type(target).__name__}")
        target.extend(values)

    def setitem(self) -> None:
        value = self.pop()
        self.set_items([self.pop(), value])

    def setitems(self) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError(f"its pickle sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise PickleError(f"its pickle has a key of type {type(key).__name__}, not text")
            target[key] = value

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("its pickle has a name that is not text")
        self.stack.append(_known(module, name))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        key = function.key if isinstance(function, Global) else None
        if key == ORDERED and arguments == ():
            self.stack.append({})
        elif key == REBUILD and isinstance(arguments, tuple) and len(arguments) >= 4:
            self.stack.append(Tensor(*arguments[:4]))
        else:
            raise PickleError("its pickle makes something other than a tensor or a dictionary")

    def build(self) -> None:
        self.pop()  # attributes of a state_dict
        if not isinstance(self.top(), dict):
            raise PickleError("its pickle sets attributes of something other than a dictionary")

    def binpersid(self) -> None:
        pid = self.pop()
        if isinstance(pid, tuple) and len(pid) == 5 and type(pid[0]) is str and pid[0] == "storage":
            _, kind, key, _, length = pid
            dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
            if dtype is not None and isinstance(key, str) and type(length) is int:
                self.stack.append(Storage(dtype, key, length))
                return
        raise PickleError("its pickle names an unknown kind of storage")


OPCODES: dict[str, Callable[[_Machine], None]] = {
    "TUPLE": _Machine.tuple_,
    "LIST": _Machine.list_,
    "DICT": _Machine.dict_,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.binpersid,
}


def _known(module: str, name: str) -> Global:
    """Return a name that pickles of tensors use.

    Raises:
        ForbiddenName: If it is another name.
    """
    if (module, name) in (ORDERED, REBUILD) or (module == "torch" and name in STORAGES):
        return Global(module, name)
    text = f"{module}.{name}"
    raise ForbiddenName(text if text.isprintable() and len(text) < 100 else shown(text))
