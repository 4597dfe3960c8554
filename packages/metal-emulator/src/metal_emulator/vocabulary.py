"""Find functions, types and attributes that Apple's compiler may not know.

The Metal kernels of MLX and mlx-lm compile on many Macs every day, so the names in them exist. A
name that a kernel uses beyond those must be in `SPECIFIED`, with its section of the Metal Shading
Language Specification.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from .build import MLX_INCLUDE
from .errors import Finding, finding
from .source import strip_comments, without_instantiations

# Name -> section of the specification. Names of namespace `metal` have no prefix.
SPECIFIED = {
    "precise::divide": "Math Functions",
    "fast::exp2": "Math Functions",
    "fast::tanh": "Math Functions",
    "fast::rsqrt": "Math Functions",
    "precise::exp2": "Math Functions",
    "simd_ballot": "SIMD-Group Functions",
    "simd_broadcast_first": "SIMD-Group Functions",
    "mem_flags::mem_none": "Synchronization Functions",
    "mem_flags::mem_device": "Synchronization Functions",
    "threadgroups_per_grid": "Attributes for Kernel Function Input Arguments",
    "thread_execution_width": "Attributes for Kernel Function Input Arguments",
    "dispatch_threads_per_threadgroup": "Attributes for Kernel Function Input Arguments",
    "threads_per_grid": "Attributes for Kernel Function Input Arguments",
    "threads_per_simdgroup": "Attributes for Kernel Function Input Arguments",
    "threads_per_threadgroup": "Attributes for Kernel Function Input Arguments",
    "thread_index_in_threadgroup": "Attributes for Kernel Function Input Arguments",
    "simdgroups_per_threadgroup": "Attributes for Kernel Function Input Arguments",
}
SPECIFIED |= {
    f"{kind}{size}": "Vector Data Types"
    for kind in (
        "bool",
        "char",
        "uchar",
        "short",
        "ushort",
        "int",
        "uint",
        "half",
        "float",
        "bfloat",
    )
    for size in (2, 3, 4)
}
_KEYWORDS = frozenset(
    [
        "alignas",
        "alignof",
        "auto",
        "bool",
        "break",
        "case",
        "char",
        "class",
        "const",
        "const_cast",
        "constexpr",
        "continue",
        "decltype",
        "default",
        "do",
        "else",
        "enum",
        "explicit",
        "extern",
        "false",
        "float",
        "for",
        "friend",
        "if",
        "inline",
        "int",
        "long",
        "mutable",
        "namespace",
        "nullptr",
        "operator",
        "private",
        "protected",
        "public",
        "reinterpret_cast",
        "restrict",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "static_assert",
        "static_cast",
        "struct",
        "switch",
        "template",
        "this",
        "true",
        "typedef",
        "typename",
        "union",
        "unsigned",
        "using",
        "void",
        "volatile",
        "while",
        "device",
        "constant",
        "threadgroup",
        "thread",
        "kernel",
        "define",
        "undef",
        "ifdef",
        "ifndef",
        "endif",
        "elif",
        "defined",
        "pragma",
        "include",
        "error",
        "once",
        "line",
    ]
)
_WORD = r"[A-Za-z_]\w*"
_CHAIN = re.compile(rf"(?<![\w.:])(?<!->){_WORD}(?:\s*::\s*{_WORD})*")
_ATTRIBUTES = re.compile(r"\[\[(.*?)\]\]", flags=re.S)
_NUMBER = re.compile(r"(?<!\w)(?:0[xX][\da-fA-F]+|\d+\.?\d*(?:[eE][-+]?\d+)?)[uUlLfFhH]*")


class Names(NamedTuple):
    """The names in a source.

    Attributes:
        used: names in use and their positions; qualified names are joined by `::`.
        attributes: names within `[[...]]` and their positions.
        types: types, functions, macros and namespaces that the source defines.
        variables: variables, members and parameters that it declares.
    """

    used: dict[str, int]
    attributes: dict[str, int]
    types: set[str]
    variables: set[str]


def names_in(text: str) -> Names:
    """Return the names in a Metal source, by regular expressions instead of a parser."""
    text = without_instantiations(strip_comments(text))
    attributes: dict[str, int] = {}
    for group in _ATTRIBUTES.finditer(text):
        for match in re.finditer(_WORD, group.group(1)):
            attributes.setdefault(match.group(), group.start(1) + match.start())
    plain = _ATTRIBUTES.sub(lambda m: " " * len(m.group()), text)
    plain = re.sub(r'"[^"\n]*"', lambda m: " " * len(m.group()), plain)
    plain = re.sub(
        r"^\s*#\s*(?:include|pragma)[^\n]*", lambda m: " " * len(m.group()), plain, flags=re.M
    )
    plain = _NUMBER.sub(lambda m: "0" * len(m.group()), plain)
    used: dict[str, int] = {}
    for match in _CHAIN.finditer(plain):
        parts = re.split(r"\s*::\s*", match.group())
        if parts[0] == "metal" and len(parts) > 1:
            name = "metal::" + "::".join(parts[1:])
        else:
            name = "::".join(parts)
        used.setdefault(name, match.start())
    types = _defined_names(plain)
    return Names(used, attributes, types, _declared_variables(plain, types))


def unknown_names(source: str, known_names: Collection[str] = ()) -> list[Finding]:
    """Return the names that no kernel of MLX or mlx-lm uses and that are not specified.

    Args:
        source: the Metal source.
        known_names: further names that Metal has.
    """
    own = names_in(source)
    known = shipped()
    found = []
    for name, position in own.used.items():
        if name not in known_names and not _is_known(name, own, known):
            message = f"'{name}' occurs in no kernel that MLX or mlx-lm ships"
            found.append(finding(message, _line(source, position), source))
    for name, position in own.attributes.items():
        if name not in known.attributes | SPECIFIED.keys() and name not in known_names:
            message = f"attribute '{name}' occurs in no kernel that MLX or mlx-lm ships"
            found.append(finding(message, _line(source, position), source))
    return found


class Shipped(NamedTuple):
    """Names in the kernels of MLX and mlx-lm.

    Attributes:
        unqualified: names without `metal::`.
        qualified: names with `metal::`, which is removed.
        prelude: names defined by the headers that MLX puts before a custom kernel.
        attributes: names within `[[...]]`.
    """

    unqualified: frozenset[str]
    qualified: frozenset[str]
    prelude: frozenset[str]
    attributes: frozenset[str]


@functools.cache
def shipped() -> Shipped:
    """Return the names in the kernels of the installed packages `mlx` and `mlx_lm`.

    Raises:
        ModuleNotFoundError: MLX is not installed.
    """
    if MLX_INCLUDE is None:
        raise ModuleNotFoundError("MLX is not installed")
    folder = MLX_INCLUDE / "mlx" / "backend" / "metal" / "kernels"
    headers = {path: names_in(path.read_text()) for path in sorted(folder.rglob("*.h"))}
    sources = [*headers.values(), *map(names_in, _mlx_lm_kernels())]
    prelude: set[str] = set()
    for path, entry in headers.items():
        if path.name in _PRELUDE_HEADERS:
            prelude |= entry.types | entry.variables
    defined = {name for entry in sources for name in entry.types}
    unqualified: set[str] = set()
    # MLX adds overloads for bfloat to existing functions of namespace metal.
    qualified = set(headers[folder / "bf16_math.h"].types)
    attributes: set[str] = set()
    for entry in sources:
        attributes |= set(entry.attributes)
        for name in entry.used:
            if name.startswith("metal::"):
                qualified.add(name.removeprefix("metal::"))
            elif name not in defined and name not in entry.variables:
                unqualified.add(name)
    return Shipped(
        frozenset(unqualified), frozenset(qualified), frozenset(prelude), frozenset(attributes)
    )


_PRELUDE_HEADERS = {"utils.h", "bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h"}


def _is_known(name: str, own: Names, known: Shipped) -> bool:
    if name.startswith("metal::"):
        name = name.removeprefix("metal::")
        return name in known.qualified | known.unqualified or name in SPECIFIED
    if name in _KEYWORDS or name in own.types or name in own.variables:
        return True
    if name.split("::")[0] in own.types | own.variables:
        return True  # a member of a struct or namespace of the kernel
    return name in known.unqualified | known.qualified | known.prelude or name in SPECIFIED


def _defined_names(text: str) -> set[str]:
    names = set(re.findall(rf"#\s*define\s+({_WORD})", text))
    names |= set(re.findall(rf"\b(?:struct|class|union|enum|namespace|typename)\s+({_WORD})", text))
    names |= set(re.findall(rf"\busing\s+({_WORD})\s*=", text))
    names |= set(re.findall(rf"\btypedef\b[^;]*?\b({_WORD})\s*;", text))
    # A function: return type, name, parameters, body.
    head = (
        rf"[\w>&*]\s+[*&]?\s*({_WORD})\s*\((?:[^()]|\([^()]*\))*\)\s*(?:const\s*)?(?:thread\s*)?\{{"
    )
    names |= set(re.findall(head, text))
    return names - _KEYWORDS


_QUALIFIER = r"(?:const|constexpr|static|inline|volatile|device|constant|threadgroup|thread|struct)"
_BUILTIN = (
    r"(?:(?:unsigned|signed)\s+)?(?:auto|void|bool|float|half|bfloat\w*|char|short|int|long|unsigned"
    r"|u(?:char|short|int|long)|size_t|u?int\d+_t|float16_t"
    r"|(?:float|half|bfloat|u?char|u?short|u?int|u?long|bool)[234])"
)
_POINTER = r"\s*(?:const\s*)?(?:[*&]+\s*(?:const\s+|restrict\s+)?|\s)\s*"
_END = r"\s*(?=[=;,)\[({:])"


def _declared_variables(text: str, types: Iterable[str]) -> set[str]:
    own = "|".join(map(re.escape, types)) or "$^"
    argument = r"(?:\s*<[^;{}]*?>)?"
    # A statement that starts with a type, which may be any name.
    word = rf"(?!(?:return|else|case|goto|using|delete)\b){_WORD}(?:::{_WORD})*"
    any_type = rf"(?:{_QUALIFIER}\s+)*(?:{_BUILTIN}|{word}){argument}"
    statement = re.compile(rf"(?:^|(?<=[;{{}}]))\s*{any_type}{_POINTER}({_WORD}){_END}", re.M)
    # A parameter, a template parameter or a loop variable: only certain types.
    sure = (
        rf"(?:(?:{_QUALIFIER}\s+)+(?:{_BUILTIN}|{_WORD}(?:::{_WORD})*)|{_BUILTIN}|{own}){argument}"
    )
    parameter = re.compile(rf"(?<=[(,<])\s*{sure}{_POINTER}({_WORD})\s*(?=[=;,)\[({{:>])")
    names: set[str] = set()
    for pattern in (statement, parameter):
        for match in pattern.finditer(text):
            names.add(match.group(1))
            names |= _further_declarators(text, match.end())
    names |= set(re.findall(rf"\benum\b[^{{;]*\{{\s*({_WORD})", text))
    return names - _KEYWORDS


def _further_declarators(text: str, start: int) -> set[str]:
    """Return the other names of `int i = 0, j = 1;`."""
    depth, names, position = 0, set(), start
    while position < len(text) and text[position] not in ";{}":
        char = text[position]
        depth += {"(": 1, "[": 1, "<": 1, ")": -1, "]": -1, ">": -1}.get(char, 0)
        if depth < 0:
            break
        if char == "," and depth == 0:
            match = re.match(rf",\s*[*&]*\s*({_WORD})\s*(?=[=;,\[])", text[position:])
            if match:
                names.add(match.group(1))
        position += 1
    return names


def _mlx_lm_kernels() -> list[str]:
    """Return the strings of mlx-lm's modules that make custom kernels."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.origin is None:
        return []
    texts = []
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        content = path.read_text()
        if "metal_kernel" not in content:
            continue
        tree = list(ast.walk(ast.parse(content)))
        documentation = {id(node.value) for node in tree if isinstance(node, ast.Expr)}
        for node in tree:
            if id(node) in documentation or not isinstance(node, ast.Constant):
                continue
            if isinstance(node.value, str) and ";" in node.value:
                texts.append(node.value)
    return texts


def _line(source: str, position: int) -> int:
    return source.count("\n", 0, position) + 1
