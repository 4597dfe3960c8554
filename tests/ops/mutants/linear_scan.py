"""Mutants of `linear_scan.metal`."""

from metal_emulator.mutation import checked, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier", BARRIER, ""),
    values("reset ignored", "restart ? 0.0f : product[k]", "product[k]"),
    values("tail drops the state", "product[k]) : 1.0f", "product[k]) : 0.0f"),
    values(
        "product before the sum that needs it",
        "partial[k] += product[k] * partial[k - 1];\n    product[k] *= product[k - 1];",
        "product[k] *= product[k - 1];\n    partial[k] += product[k] * partial[k - 1];",
    ),
    values("initial state ignored", "float h = h0[row * width + d];", "float h = 0.0f;"),
    checked(
        "h_last of half the lanes",
        "if (split == 0 && writes)",
        "if (split == 0 && writes && lane < 16)",
    ),
    values("a step skipped at each simdgroup", "int k = 1; k < STEPS", "int k = 2; k < STEPS"),
    checked("stores one step late", "y[base + ulong(first + k)", "y[base + ulong(first + k + 1)"),
]
