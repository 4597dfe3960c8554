"""Rewrite Metal source to C++ and CUDA, and parse the signature of a kernel.

The rewriting keeps the source line by line. It changes the three constructs that a header cannot
define in C++: variables in threadgroup memory, function constants, and attributes of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

# Metal attribute of a parameter -> field of `mtl_thread` in the runtime.
THREAD_ATTRIBUTES = {
    "thread_position_in_grid": "position_in_grid",
    "thread_position_in_threadgroup": "position_in_group",
    "threadgroup_position_in_grid": "group_position",
    "threads_per_threadgroup": "group_size",
    "dispatch_threads_per_threadgroup": "group_size",
    "threadgroups_per_grid": "groups_in_grid",
    "threads_per_grid": "grid_size",
    "grid_size": "grid_size",
    "thread_index_in_threadgroup": "index_in_group",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroups",
    "dispatch_simdgroups_per_threadgroup": "simdgroups",
    "thread_execution_width": "simd_width",
    "threads_per_simdgroup": "simd_width",
}
VECTOR_FIELDS = {
    "position_in_grid",
    "position_in_group",
    "group_position",
    "group_size",
    "groups_in_grid",
    "grid_size",
}

_DECLARATOR = r"[A-Za-z_]\w*\s*(?:\[[^;]*?\]\s*)*"
THREADGROUP_VARIABLE = re.compile(
    r"(?<![\w:])(?P<align>(?:alignas\([^)]*\)\s*)?)threadgroup\s+"
    r"(?P<type>(?:[A-Za-z_]\w*::)*[A-Za-z_]\w*(?:\s*<[^;{}()]*>)?)\s+"
    rf"(?P<declarators>{_DECLARATOR}(?:,\s*{_DECLARATOR})*);"
)
_FUNCTION_CONSTANT = re.compile(
    r"constant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\((\d+)\)\s*\]\]\s*;"
)
_HOST_NAME_LINE = re.compile(r"^template\s*\[\[host_name.*?;[ \t]*$", flags=re.M)
_ATTRIBUTE = re.compile(
    r"\[\[\s*(?:kernel(?:\s*,[^\]]*)?|host_name\([^)]*\)|buffer\([^)]*\)|threadgroup\(\d+\)"
    r"|function_constant\([^)]*\)|max_total_threads_per_threadgroup\([^)]*\)"
    r"|[a-z_]+_(?:in|per)_[a-z_]+|thread_execution_width|grid_size)"
    r"(?:\s*,\s*function_constant\([^)]*\))?\s*\]\]"
)
_ADDRESS_SPACE = re.compile(r"(?<![\w:\[])(device|constant|threadgroup|thread)\b(?!\s*[\]_(])")


class Parameter(NamedTuple):
    """A parameter of a kernel function.

    Attributes:
        name: its name.
        type: its C++ type, as written.
        slot: binding index of a buffer.
        field: field of `mtl_thread` for a thread attribute, empty for a buffer.
    """

    name: str
    type: str
    slot: int
    field: str

    @property
    def is_buffer(self) -> bool:
        return not self.field


def strip_comments(text: str) -> str:
    """Return the text with blanks instead of comments; line numbers do not change."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)


def without_instantiations(text: str) -> str:
    """Return the text without MLX's `template [[host_name(...)]]` lines, which are not C++."""
    return _HOST_NAME_LINE.sub("", text)


def for_execution(text: str) -> str:
    """Return C++ that registers threadgroup variables with the runtime."""

    def variable(match: re.Match[str]) -> str:
        names = _declared_names(match["declarators"])
        notes = " ".join(f'mtl::threadgroup_variable({n}, "{n}");' for n in names)
        return f"{match['align']}static {match['type']} {match['declarators']}; {notes}"

    def constant(match: re.Match[str]) -> str:
        kind, name, number = match.groups()
        setter = f"[] {{ {name} = mtl::function_constant<{kind}>({number}); }}"
        return f"static {kind} {name}; static mtl::on_constants_set mtl_set_{name}({setter});"

    return _rewrite(text, variable, constant)


def for_type_check(text: str) -> str:
    """Return C++ for clang, with address spaces as part of the types."""

    def variable(match: re.Match[str]) -> str:
        head = f"{match['align']}static threadgroup {match['type']}"
        return f"{head} {match['declarators']};"

    def constant(match: re.Match[str]) -> str:
        return f"extern constant {match[1]} {match[2]};"

    return _rewrite(text, variable, constant)


def for_cuda(text: str) -> str:
    """Return CUDA: threadgroup variables are `__shared__`, other address spaces are removed."""

    def variable(match: re.Match[str]) -> str:
        return f"{match['align']}__shared__ {match['type']} {match['declarators']};"

    def constant(match: re.Match[str]) -> str:
        return f"__constant__ {match[1]} {match[2]};"

    # Not by macros: a macro `device` would break CUDA's own __attribute__((device)).
    return _ADDRESS_SPACE.sub(" ", _rewrite(text, variable, constant))


def parameters(text: str, function: str) -> list[Parameter]:
    """Return the parameters of kernel `function`, in order.

    Raises:
        ValueError: the text has no such kernel.
    """
    text = strip_comments(text)
    head = re.search(
        r"(?:\[\[\s*kernel[^\]]*\]\]|\bkernel\b)\s+void\s+" + function + r"\s*\(", text
    )
    if head is None:
        raise ValueError(f"no kernel function '{function}' in the source")
    found: list[Parameter] = []
    next_slot = 0
    for declaration in split_arguments(text[head.end() : _closing(text, head.end())]):
        groups = re.findall(r"\[\[(.*?)\]\]", declaration, flags=re.S)
        attributes = [a.strip() for group in groups for a in split_arguments(group)]
        plain = re.sub(r"\[\[.*?\]\]", "", declaration, flags=re.S).strip()
        name = re.findall(r"\w+", plain)[-1]
        ctype = plain[: -len(name)].strip()
        field = next((THREAD_ATTRIBUTES[a] for a in attributes if a in THREAD_ATTRIBUTES), "")
        slot = next_slot
        if not field:
            bound = re.search(r"buffer\((\d+)\)", " ".join(attributes))
            slot = int(bound.group(1)) if bound else next_slot
            next_slot = slot + 1
        found.append(Parameter(name, ctype, slot, field))
    return found


def split_arguments(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        if char in "(<[{":
            depth += 1
        elif char in ")>]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


_Replace = Callable[[re.Match[str]], str]


def _rewrite(text: str, variable: _Replace, constant: _Replace) -> str:
    text = without_instantiations(strip_comments(text))
    text = THREADGROUP_VARIABLE.sub(variable, text)
    text = _FUNCTION_CONSTANT.sub(constant, text)
    return _ATTRIBUTE.sub("", text)


def _declared_names(declarators: str) -> list[str]:
    return [re.findall(r"[A-Za-z_]\w*", d)[0] for d in split_arguments(declarators)]


def _closing(text: str, start: int) -> int:
    depth = 1
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError("unbalanced parentheses in the kernel's signature")
