"""Check the source of a kernel against rules of the language, without a compiler."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .errors import Finding, finding
from .source import THREADGROUP_VARIABLE, strip_comments, without_instantiations

# Features of C++ that Metal does not have.
_FORBIDDEN = [
    (r"\b(?:long\s+)?double\b", "Metal has no double"),
    (r"\blong\s+long\b", "Metal has no long long"),
    (r"\bnew\b|\bdelete\b|\bmalloc\b", "Metal has no dynamic memory"),
    (r"\bgoto\b", "Metal has no goto"),
    (r"\b(?:try|catch|throw)\b", "Metal has no exceptions"),
    (r"\b(?:dynamic_cast|typeid|virtual)\b", "Metal has no run-time types"),
    (r"\b(?:thread_local|asm)\b", "not in Metal"),
    (r"\bstd::", "Metal has no C++ standard library"),
    (r"\bprintf\b", "Metal has no printf"),
    (r"\[\s*[&=]?\s*\w*\s*\]\s*\([^)]*\)\s*(?:->\s*\w+\s*)?\{", "no lambdas before Metal 4"),
    (r"#\s*include\s*<(?!metal_)", "only <metal_...> headers exist"),
    (r"\bsimdgroup_async_copy", "an undocumented function"),
]
# Features of Metal that CUDA does not have, or interprets differently.
_NOT_PORTABLE = [
    (
        r"(?<![\w.])(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?(?![\w.])",
        "a literal without the suffix f",
    ),
    (r"\.(?:[xyzw]{2,4}|[rgba]{2,4})\b(?!\s*\()", "no swizzles"),
]
_SCALARS = (
    r"(?:float|half|bfloat|bfloat16_t|float16_t|int|uint|short|ushort|char|uchar|long|ulong|bool"
    r"|size_t|u?int(?:8|16|32|64)_t"
)
_VECTORS = r"(?:float|half|bfloat|int|uint|short|ushort|char|uchar|long|ulong)[234]"
_TYPES = rf"{_SCALARS}|{_VECTORS}|atomic_\w+|atomic<\w+>|simdgroup_matrix<[^;]*?>)"
_SPACES = re.compile(r"\b(?:device|constant|threadgroup|thread)\b")
_KERNEL = re.compile(r"\[\[\s*kernel|\bkernel\s+void\b")


def lint(source: str, portable: bool = False) -> list[Finding]:
    """Return the violations of the rules.

    Args:
        source: the Metal source.
        portable: also report features that CUDA does not have or interprets differently.
    """
    text = without_instantiations(strip_comments(source))
    rules = _FORBIDDEN + (_NOT_PORTABLE if portable else [])
    found = []
    for pattern, why in rules:
        for match in re.finditer(pattern, text):
            found.append(_at(source, text, match.start(), f"{why}: '{match.group().strip()}'"))
    for position, message in [*_missing_spaces(text), *_misplaced_variables(text)]:
        found.append(_at(source, text, position, message))
    return sorted(found, key=lambda entry: entry.line)


def _at(source: str, text: str, position: int, message: str) -> Finding:
    return finding(message, text.count("\n", 0, position) + 1, source)


def _missing_spaces(text: str) -> Iterator[tuple[int, str]]:
    """Yield pointers and references to scalars without an address space."""
    parameters = "|".join(re.findall(r"(?:typename|class)\s+(\w+)", text)) or "$^"
    declaration = re.compile(
        r"(?:\b(?:const|volatile|static|constexpr|inline|METAL_FUNC)\s+)*"
        rf"\b({_TYPES}|{parameters})\s*(?:const\s*)?[*&]+\s*(?:const\s+|restrict\s+)?\w+\s*(?=[=;,)\[({{])"
    )
    for match in declaration.finditer(text):
        # The beginning of the same declaration or parameter.
        before = re.split(r"[;{}(,<]", text[max(0, match.start() - 60) : match.start()])[-1]
        if not _SPACES.search(before + match.group()):
            yield match.start(), f"no address space: '{match.group().strip()}'"


def _misplaced_variables(text: str) -> Iterator[tuple[int, str]]:
    """Yield threadgroup variables that are not in the outermost block of a kernel function."""
    head = _KERNEL.search(text)
    if head is None:
        return
    for match in THREADGROUP_VARIABLE.finditer(text):
        shown = match.group().strip()
        if match.start() < head.start():
            yield match.start(), f"threadgroup variable outside of a kernel: '{shown}'"
            continue
        body = text[text.index("{", head.end()) : match.start()]
        if body.count("{") - body.count("}") != 1:
            yield match.start(), f"threadgroup variable in an inner block: '{shown}'"
