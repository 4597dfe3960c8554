"""Mutants of the sample kernel, and the finding that the checked mode must report for each."""

from metal_emulator.mutation import Edit, Mutant, checked

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = "products[s * 32 + lane] = running_product;"
LENGTH = "const int length = dims[0];"
END = "  last[b * width + d] = carry;\n}\n"
HEADER_END = "  return 1.0f / (1.0f + metal::exp(rate));\n}\n"
RACE = "data race on threadgroup"


def report(name: str, old: str, new: str, message: str, line: str = "", occurrence: int = 0):
    """Return a mutant for which the checked mode reports a message about a line."""
    return checked(name, old, new, occurrence, message=message, line=line)


def with_helper(name: str, helper: str, *edits: Edit, message: str, line: str):
    """Return a mutant that also defines a helper function."""
    added = Edit(HEADER_END, f"{HEADER_END}{helper}\n", file="decay.metal")
    return Mutant(name, "checked", (*edits, added), message=message, line=line)


SYNCHRONISATION = [
    report("no barrier before reading", BARRIER, "", "uninitialised threadgroup memory", "carry ="),
    report("no barrier before overwriting", BARRIER, "", RACE, "carry =", -1),
    report(
        "barrier for device memory only",
        BARRIER,
        "threadgroup_barrier(mem_flags::mem_device);",
        RACE,
        "carry =",
    ),
    report(
        "barrier for no memory",
        BARRIER,
        "threadgroup_barrier(mem_flags::mem_none);",
        RACE,
        "carry =",
    ),
    report(
        "simdgroup barrier between simdgroups",
        BARRIER,
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "uninitialised threadgroup memory",
        "carry =",
    ),
    report(
        "barrier in a branch that some threads skip",
        BARRIER,
        f"if (first < length) {{ {BARRIER} }}",
        RACE,
        "carry =",
    ),
    report(
        "return before a barrier",
        LENGTH,
        f"{LENGTH}\nif (int(simdgroup_index_in_threadgroup) * L >= length - 30) {{ return; }}",
        "divergent barrier",
        BARRIER,
    ),
    with_helper(
        "barrier through two calls",
        f"METAL_FUNC void synchronize() {{ {BARRIER} }}",
        Edit(BARRIER, "if (s < 2) { synchronize(); } else { synchronize(); }"),
        message="divergent barrier: reached through different calls",
        line="synchronize",
    ),
    report(
        "simd_sum in a branch that some lanes skip",
        STORE,
        f"{STORE}\nif (lane < 7) {{ carry += 0.0f * simd_sum(running_sum); }}",
        "divergent simd_sum: reached by 7 of 32 lanes",
        "simd_sum",
    ),
    with_helper(
        "simd_sum through two calls",
        "METAL_FUNC float total(float value) { return simd_sum(value); }",
        Edit(
            STORE,
            f"{STORE}\ncarry += 0.0f * (lane < 7 ? total(running_sum) : total(running_product));",
        ),
        message="divergent simdgroup operation: reached through different calls",
        line="simd_sum",
    ),
    report(
        "simdgroup operation after some lanes have ended",
        END,
        f"{END}\nif (lane > 3) {{ return; }}\nlast[b * width + d] = simd_max(carry);",
        "divergent simd_max: reached by 4 of 32 lanes",
        "simd_max",
    ),
    report(
        "exchange within a simdgroup without a barrier",
        STORE,
        f"{STORE}\nrunning_sum += 0.0f * products[s * 32 + (lane ^ 1)];",
        RACE,
        "running_sum += 0.0f",
    ),
]

MEMORY = [
    report(
        "load past the end",
        "if (t < length) {",
        "if (true) {",
        "out-of-bounds read of 4 B, 4 B past the end of 'rate'",
        "decay(static_cast",
    ),
    report(
        "store past the end",
        "if (t < length) {",
        "if (true) {",
        "of an element that another thread",
        "y[(b *",
        -1,
    ),
    report(
        "index one row too high",
        "uint(t)) * width + d;",
        "uint(t) + 1) * width + d;",
        "past the end of 'rate'",
        "decay(static_cast",
    ),
    report(
        "negative index",
        "start[b * width + d];",
        "start[int(b * width + d) - 1];",
        "4 B before 'start'",
        "start[",
    ),
    report(
        "threadgroup array too small",
        "sums[S * 32];",
        "sums[S * 32 - 1];",
        "array index out of bounds (index 127)",
        "sums[s * 32",
    ),
    report(
        "private array overrun",
        "product[i] = running",
        "product[i + 1] = running",
        "array index out of bounds (index 4)",
        "product[i + 1]",
    ),
    report(
        "output never written",
        "if (s == 0) {",
        "if (s == 99) {",
        "output 'last': 128 of 128 elements are never written",
    ),
    report(
        "output partly written",
        "if (s == 0) {",
        "if (s == 0 && lane < 31) {",
        "output 'last': 4 of 128 elements are never written",
    ),
    report(
        "output written by several simdgroups",
        "if (s == 0) {",
        "if (true) {",
        "data race on device 'last'",
        "last[b",
    ),
    report(
        "output written again after a barrier",
        END,
        f"{END}\nthreadgroup_barrier(mem_flags::mem_device);"
        "\nif (s == 1) { last[b * width + d] = carry; }",
        "output 'last': an element is written by more than one thread",
        "if (s == 1)",
    ),
    report(
        "output read before it is written",
        "last[b * width + d] = carry;",
        "last[b * width + d] += carry;",
        "read of uninitialised device memory 'last'",
        "+= carry",
    ),
    report("lanes that overlap", STORE, STORE.replace("lane", "(lane | 1)"), RACE, "(lane | 1)"),
    report(
        "threadgroup memory partly written",
        STORE,
        f"if (lane < 16) {{ {STORE} }}",
        "uninitialised threadgroup memory 'products'",
        "carry =",
    ),
    report(
        "write to an input",
        STORE,
        f"{STORE}\n((device float*)start)[b * width + d] = carry;",
        "write to input 'start'",
        "(device float*)start",
    ),
    report(
        "misaligned vector",
        "start[b * width + d];",
        "(*(device const float4*)(start + 1)).x;",
        "not aligned to 16 bytes",
        "float4",
    ),
    report(
        "too much threadgroup memory",
        "threadgroup float sums[S * 32];",
        "threadgroup float sums[S * 32 + 8192];",
        "threadgroup memory of 33792 B exceeds 32768 B",
        "sums[S",
    ),
]

UNDEFINED_BEHAVIOUR = [
    with_helper(
        "recursion",
        "inline float descend(float x, int n) {\n"
        "  return n <= 0 ? x : descend(x, n - 1) + descend(x + 1, n - 2);\n}",
        Edit(LENGTH, f"{LENGTH}\nconst float depth = descend(1.0f, length & 3);"),
        Edit("float carry = start", "float carry = 0.0f * depth + start"),
        message="recursion",
        line="descend",
    ),
    report(
        "integer overflow",
        "const uint b =",
        "int big = 2147483647; big += dims[0]; const uint b = uint(big * 0) +",
        "signed overflow (+)",
        "2147483647",
    ),
    report(
        "integer division by zero",
        "int(s) * L;",
        "int(s) * L + 0 * (length / (length - 37));",
        "division by zero",
        "length / (",
    ),
    report(
        "shift too far",
        "const int first = tile",
        "const int first = 0 * (1 << (length - 5)) + tile",
        "shift",
        "1 <<",
    ),
    report(
        "float too large for an integer",
        "const int first = tile",
        "const int first = 0 * int(1e20f * float(length)) + tile",
        "float to integer out of range",
        "1e20f",
    ),
    report(
        "waiting for a thread that waits too",
        "threadgroup float sums[S * 32];",
        "threadgroup float sums[S * 32];\n"
        "threadgroup atomic_uint ready;\n"
        "while (atomic_load_explicit(&ready, memory_order_relaxed) != s) {}",
        "an endless loop?",
        "while",
    ),
]

MUTANTS = [*SYNCHRONISATION, *MEMORY, *UNDEFINED_BEHAVIOUR]
