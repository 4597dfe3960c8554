"""PyTorch checkpoints, read without PyTorch and without running what is pickled in them.

A `.pt` file is a zip archive, nothing in it compressed: `data.pkl` says which tensors there are
and `data/<key>` holds the bytes of a storage that they lie in. Unpickling can call anything that
is importable; here it can name three things, and calls nothing but code of this file.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rgemma.checkpoints.safetensors import ITEM_SIZE, MEND, TensorInfo
from mlx_rgemma.errors import CheckpointError

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
"""What `torch` calls the storages of each dtype."""

BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
"""Whole numbers of the size of each dtype that weights have."""

MAX_PICKLE_BYTES = 64_000_000
READ_TOGETHER = 1 << 24
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
LOCAL_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class _Storage:
    """A storage that a pickle names."""

    dtype: str
    key: str
    length: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor that a pickle describes; nothing of it is checked yet."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class TorchFile:
    """The tensors of a `.pt` file, each read when it is asked for.

    Attributes:
        path: The file.
        tensors: Name, dtype and shape of each.
    """

    transposed_kernels = False

    def __init__(self, path: Path) -> None:
        """Read the file's directory and its pickle.

        Raises:
            CheckpointError: If the file is damaged, or its pickle holds anything but tensors.
        """
        self.path = path
        self._checked: set[str] = set()
        self._guarded(self._open)
        self.tensors = {
            name: TensorInfo(name, tensor.storage.dtype, tensor.shape, path)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, part: int | None = None) -> np.ndarray[Any, Any]:
        """The bits of a tensor, or of one of its parts along the first axis.

        Returns:
            An array of whole numbers of the size of the dtype, which reads the file where it is
            looked at.

        Raises:
            CheckpointError: If the bytes of the tensor do not have the checksum that they should.
        """
        return self._guarded(lambda: self._read(name, part))

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Do something with the file, and make whatever it stumbles over one line."""
        try:
            return work()
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror or error})."
            ) from error
        except Exception as error:  # the many ways in which zipfile and pickle meet damage
            what = " ".join(str(error).split()) or type(error).__name__
            raise self._damaged(what) from error

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a sound PyTorch file: {what}; {MEND}.")

    def _open(self) -> None:
        self._size = self.path.stat().st_size
        with zipfile.ZipFile(self.path) as archive:
            entries = archive.infolist()
            self._entries = {entry.filename: entry for entry in entries}
            if len(self._entries) != len(entries):
                raise self._damaged("two entries of one name")
            pickles = [n for n in self._entries if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise self._damaged("it holds no data.pkl" if not pickles else "several data.pkl")
            self._prefix = pickles[0].removesuffix("data.pkl")
            for name in self._entries:
                self._check_entry(name)
            order = self._prefix + "byteorder"
            if order in self._entries and archive.read(order).strip() != b"little":
                raise CheckpointError(f"{self.path}: written on a big-endian machine.")
            if self._entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise self._damaged("data.pkl is too large for names and shapes")
            content = archive.read(pickles[0])
        values = _Unpickler(self.path, content).load()
        if not isinstance(values, dict) or not values:
            raise CheckpointError(f"{self.path}: not a dictionary of tensors.")
        self._tensors = {name: self._tensor(name, value) for name, value in values.items()}

    def _check_entry(self, name: str) -> None:
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise self._damaged(f"{name!r} is compressed or encrypted")
        if entry.file_size != entry.compress_size or entry.file_size > self._size:
            raise self._damaged(f"{name!r} is larger than its place in the file")

    def _tensor(self, name: Any, value: Any) -> _Tensor:
        """What the pickle says of a tensor, checked against its storage."""
        if not isinstance(name, str):
            raise CheckpointError(f"{self.path}: {name!r} is no name of a tensor.")
        if not isinstance(value, _Tensor):
            raise CheckpointError(
                f"{self.path}: {name!r} is no tensor but a {type(value).__name__}; expected is a"
                " flat dictionary of tensors."
            )
        storage, shape, strides = value.storage, value.shape, value.strides
        if not isinstance(storage, _Storage) or not _sizes(shape) or not _sizes(strides):
            raise self._damaged(f"{name!r} has no proper storage and shape")
        if len(shape) != len(strides) or type(value.offset) is not int or value.offset < 0:
            raise self._damaged(f"{name!r} has no proper strides and offset")
        entry = self._entries.get(f"{self._prefix}data/{storage.key}")
        if entry is None:
            raise self._damaged(f"the storage of {name!r} is missing")
        if entry.file_size != storage.length * ITEM_SIZE[storage.dtype]:
            raise self._damaged(f"the storage of {name!r} has {entry.file_size} bytes")
        count = math.prod(shape)
        last = value.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if count == 0 or count > storage.length or last >= storage.length:
            raise self._damaged(f"{name!r} does not lie in its storage")
        return value

    def _read(self, name: str, part: int | None) -> np.ndarray[Any, Any]:
        tensor = self._tensors[name]
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        start = tensor.offset
        if part is not None:
            start += part * strides[0]
            shape, strides = shape[1:], strides[1:]
        entry = self._entries[f"{self._prefix}data/{storage.key}"]
        begin = self._begin(entry)
        if storage.key not in self._checked:
            self._check_sum(entry)
            self._checked.add(storage.key)
        kind = np.dtype(BITS[storage.dtype])
        length = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        at = begin + start * kind.itemsize
        flat = np.memmap(self.path, kind.newbyteorder("<"), "r", at, (length,))
        steps = tuple(s * kind.itemsize for s in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

    def _begin(self, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of an entry begin: behind its own header, which is looked at."""
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            header = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        begin = entry.header_offset + LOCAL_HEADER.size + header[-2] + header[-1]
        if header[0] != LOCAL_MAGIC or begin + entry.file_size > self._size:
            raise self._damaged(f"{entry.filename!r} is not where the directory says")
        return begin

    def _check_sum(self, entry: zipfile.ZipInfo) -> None:
        """Compare a storage with its CRC-32, as zipfile does at the end of what it reads."""
        with zipfile.ZipFile(self.path) as archive, archive.open(entry) as file:
            while file.read(READ_TOGETHER):
                pass


class _Unpickler(pickle.Unpickler):
    """Unpickles dictionaries, names and numbers, and what describes a tensor."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may call by name: three things, none of them torch's."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        shown = f"{module}.{name}"
        shown = shown if shown.isprintable() and len(shown) < 100 else repr(shown[:100])
        raise CheckpointError(
            f"{self.path}: its pickle asks for {shown}; only tensors and dictionaries of them are"
            " read, nothing else is loaded or run."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, by the tuple that torch writes for it."""
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            _, dtype, key, _, length = pid
            if dtype in ITEM_SIZE and isinstance(key, str) and type(length) is int:
                return _Storage(dtype, key, length)
        raise CheckpointError(f"{self.path}: its pickle names a storage that torch has not.")


def _describe(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and 0 <= n < 1 << 48 for n in values)
