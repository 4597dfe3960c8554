"""Mutants of `linear_scan_backward.metal`."""

from metal_emulator.mutation import checked, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier", BARRIER, ""),
    values("a reset has a gradient", "restart[k] ? 0.0f : h", "h"),
    values(
        "coefficient of the wrong step",
        "reverse = coefficient[k] * (g[k] + reverse)",
        "reverse = g[k] + coefficient[k] * reverse",
    ),
    values(
        "simdgroups in the wrong direction",
        "int s = int(splits) - 1; s >= 0; --s",
        "int s = 0; s < int(splits); ++s",
    ),
    values(
        "dh0 before the first step",
        "dh0[row * width + d] = after;",
        "dh0[row * width + d] = dh_last[row * width + d];",
    ),
    checked("lanes beyond the width write", "channel < width;", "true;"),
]
