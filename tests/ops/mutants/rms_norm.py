"""Mutants of `rms_norm.metal`."""

from metal_emulator.mutation import checked, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier", BARRIER, ""),
    checked("barrier for the wrong memory", "mem_threadgroup", "mem_none"),
    checked("every lane stores the sum", "if (lane == 0)", "if (true)"),
    values("no eps", " + eps[0]", ""),
    values(
        "factor without 1", "1.0f + static_cast<float>(weight[n])", "static_cast<float>(weight[n])"
    ),
    values("sum, not mean", "square / static_cast<float>(width)", "square"),
    checked("channels past the row", "n < width", "n <= width", 1),
    values("one simdgroup is not added", "s < simdgroups", "s + 1 < simdgroups"),
    checked(
        "rows share their memory",
        "threadgroup_position_in_grid.x) * width",
        "threadgroup_position_in_grid.x)",
    ),
    values("half of the threads", "n += threads", "n += 2 * threads"),
]
