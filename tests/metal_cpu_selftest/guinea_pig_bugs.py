"""Bugs to plant in the guinea pig: each is one small edit of a correct kernel."""

from __future__ import annotations

from typing import NamedTuple

from guinea_pig import BODY, HEADER

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = "products[s * 32 + lane] = running_product;"
LENGTH = "const int length = dims[0];"


class Bug(NamedTuple):
    """A bug to plant.

    Attributes:
        body: the changed kernel.
        message: part of what must be reported.
        at: part of the line that must be named, or empty where no line is at fault.
        header: the text before it.
    """

    body: str
    message: str
    at: str = ""
    header: str = HEADER


def changed(old: str, new: str, count: int = 1) -> str:
    """The kernel with one text replaced."""
    assert old in BODY
    return BODY.replace(old, new, count)


def changed_last(old: str, new: str) -> str:
    """The kernel with the last occurrence of a text replaced."""
    head, _, tail = BODY.rpartition(old)
    return head + new + tail


def after(line: str, added: str) -> str:
    """The kernel with something added behind a line."""
    return changed(line, f"{line}\n{added}")


RACE = "data race on threadgroup"
BUGS = {
    # ---- synchronisation
    "no barrier before reading": Bug(
        changed(BARRIER, ""), "uninitialised threadgroup memory", "carry ="
    ),
    "no barrier before overwriting": Bug(changed_last(BARRIER, ""), RACE, "carry ="),
    "barrier for device memory only": Bug(
        changed(BARRIER, "threadgroup_barrier(mem_flags::mem_device);"), RACE, "carry ="
    ),
    "barrier for no memory": Bug(
        changed(BARRIER, "threadgroup_barrier(mem_flags::mem_none);"), RACE, "carry ="
    ),
    "simdgroup barrier between simdgroups": Bug(
        changed(BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
        "uninitialised threadgroup memory",
        "carry =",
    ),
    "barrier in a branch that some skip": Bug(
        changed(BARRIER, f"if (first < length) {{ {BARRIER} }}"), RACE, "carry ="
    ),
    "return before a barrier": Bug(
        after(LENGTH, "if (int(simdgroup_index_in_threadgroup) * L >= length - 30) { return; }"),
        "divergent barrier",
        BARRIER,
    ),
    "barrier through two calls": Bug(
        changed(BARRIER, "if (s < 2) { meet(); } else { meet(); }"),
        "divergent barrier: reached through different calls",
        "meet",
        HEADER + f"METAL_FUNC void meet() {{ {BARRIER} }}\n",
    ),
    "simd_sum in a branch that some lanes skip": Bug(
        after(STORE, "if (lane < 7) { carry += 0.0f * simd_sum(running_sum); }"),
        "divergent simd_sum: reached by 7 of 32 lanes",
        "simd_sum",
    ),
    "simd_sum through two calls": Bug(
        after(STORE, "carry += 0.0f * (lane < 7 ? total(running_sum) : total(running_product));"),
        "divergent simdgroup operation: reached through different calls",
        "simd_sum",
        HEADER + "METAL_FUNC float total(float value) { return simd_sum(value); }\n",
    ),
    "simdgroup operation after some lanes have ended": Bug(
        BODY + "\nif (lane > 3) { return; }\nlast[b * width + d] = simd_max(carry);",
        "divergent simd_max: reached by 4 of 32 lanes",
        "simd_max",
    ),
    "neighbours in a simdgroup without a barrier": Bug(
        after(STORE, "running_sum += 0.0f * products[s * 32 + (lane ^ 1)];"),
        RACE,
        "running_sum += 0.0f",
    ),
    # ---- memory
    "load past the end": Bug(
        changed("if (t < length) {", "if (true) {"),
        "out-of-bounds read of 4 B, 4 B past the end of 'rate'",
        "decay(static_cast",
    ),
    "store past the end": Bug(
        changed_last("if (t < length) {", "if (true) {"), "of what another thread", "y[(b *"
    ),
    "index one row too high": Bug(
        changed("uint(t)) * width + d;", "uint(t) + 1) * width + d;"),
        "past the end of 'rate'",
        "decay(static_cast",
    ),
    "negative index": Bug(
        changed("start[b * width + d];", "start[int(b * width + d) - 1];"),
        "4 B before 'start'",
        "start[",
    ),
    "threadgroup array too small": Bug(
        changed("sums[S * 32];", "sums[S * 32 - 1];"),
        "array index out of bounds (index 127)",
        "sums[s * 32",
    ),
    "private array overrun": Bug(
        changed("product[i] = running", "product[i + 1] = running"),
        "array index out of bounds (index 4)",
        "product[i + 1]",
    ),
    "output never written": Bug(
        changed("if (s == 0) {", "if (s == 99) {"),
        "output 'last': 128 of 128 elements are never written",
    ),
    "output partly written": Bug(
        changed("if (s == 0) {", "if (s == 0 && lane < 31) {"),
        "output 'last': 4 of 128 elements are never written",
    ),
    "output written by several simdgroups": Bug(
        changed("if (s == 0) {", "if (true) {"), "data race on device 'last'", "last[b"
    ),
    "output written again after a barrier": Bug(
        BODY
        + "\nthreadgroup_barrier(mem_flags::mem_device);"
        + "\nif (s == 1) { last[b * width + d] = carry; }",
        "output 'last': an element is written by more than one thread",
        "if (s == 1)",
    ),
    "output read before it is written": Bug(
        changed("last[b * width + d] = carry;", "last[b * width + d] += carry;"),
        "read of uninitialised device memory 'last'",
        "+= carry",
    ),
    "lanes that overlap": Bug(
        changed(STORE, STORE.replace("lane", "(lane | 1)")), RACE, "(lane | 1)"
    ),
    "threadgroup memory partly written": Bug(
        changed(STORE, f"if (lane < 16) {{ {STORE} }}"),
        "uninitialised threadgroup memory 'products'",
        "carry =",
    ),
    "write to an input": Bug(
        after(STORE, "((device float*)start)[b * width + d] = carry;"),
        "write to input 'start'",
        "(device float*)start",
    ),
    "misaligned vector": Bug(
        changed("start[b * width + d];", "(*(device const float4*)(start + 1)).x;"),
        "not aligned to 16 bytes",
        "float4",
    ),
    "too much threadgroup memory": Bug(
        changed("threadgroup float sums[S * 32];", "threadgroup float sums[S * 32 + 8192];"),
        "threadgroup memory of 33792 B exceeds 32768 B",
        "sums[S",
    ),
    # ---- what the language leaves undefined
    "recursion": Bug(
        after(LENGTH, "const float depth = descend(1.0f, length & 3);").replace(
            "float carry = start", "float carry = 0.0f * depth + start"
        ),
        "recursion",
        "descend",
        HEADER
        + "inline float descend(float x, int n) {\n"
        + "  return n <= 0 ? x : descend(x, n - 1) + descend(x + 1, n - 2);\n}\n",
    ),
    "integer overflow": Bug(
        changed(
            "const uint b =", "int big = 2147483647; big += dims[0]; const uint b = uint(big * 0) +"
        ),
        "signed overflow (+)",
        "2147483647",
    ),
    "integer division by zero": Bug(
        changed("int(s) * L;", "int(s) * L + 0 * (length / (length - 37));"),
        "division by zero",
        "length / (",
    ),
    "shift too far": Bug(
        changed("const int first = tile", "const int first = 0 * (1 << (length - 5)) + tile"),
        "shift",
        "1 <<",
    ),
    "float too large for an integer": Bug(
        changed(
            "const int first = tile", "const int first = 0 * int(1e20f * float(length)) + tile"
        ),
        "float to integer out of range",
        "1e20f",
    ),
    "waiting for a thread that waits too": Bug(
        after(
            "threadgroup float sums[S * 32];",
            "threadgroup atomic_uint ready;\n"
            "while (atomic_load_explicit(&ready, memory_order_relaxed) != s) {}",
        ),
        "a loop that does not end?",
        "while",
    ),
}
