"""Mutants of `prefill_attention.metal`."""

from metal_emulator.mutation import checked, static, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier after the queries are loaded", BARRIER, ""),
    checked("no barrier before the next scores are stored", BARRIER, "", 1),
    checked("no barrier before the scores are read", BARRIER, "", 2),
    checked("no barrier before the weights are read", BARRIER, "", 3),
    checked("no barrier before the last factors are stored", BARRIER, "", 4),
    checked("no barrier before the last factors are read", BARRIER, "", 5),
    checked("barrier for the wrong memory", "mem_threadgroup", "mem_device", 2),
    checked("barrier of a simdgroup", BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);", 3),
    values("window one key short", "key >= oldest", "key > oldest"),
    values("query does not see itself", "key <= token", "key < token"),
    values("query sees the future", "key <= token", "key <= last_key"),
    values("window instead of max_lookback", "metal::min(lookback_of_token, window)", "window"),
    values("band of the tile without documents", "metal::min(lane_lookback, window)", "1"),
    checked("band ends too late", "(end_row - 1) / heads", "end_row / heads"),
    values("band starts too late", "simd_min(lane_oldest)", "simd_max(lane_oldest)"),
    values("keys beyond the ring", "-slots)", "-slots - 1)", None),
    values("ring turned by one", "write_pos + key + slots", "write_pos + key + slots - 1"),
    values(
        "ring not a circle",
        "write_pos + key < 0 ? write_pos + key + slots : write_pos + key",
        "write_pos + key",
        1,
    ),
    values(
        "values of the ring are its keys", "ring_keys + static_cast<size_t>(slots) * D", "ring_keys"
    ),
    values("second row of the ring", "batch) * 2 * slots", "batch) * slots"),
    values("lookback of the first row for all", "batch * lookback_stride", "0", None),
    checked(
        "keys past the chunk are read",
        "min(first + column + matrix_row, last_key)",
        "max(first + column + matrix_row, first)",
    ),
    checked("queries past the end are read", "first_row + row < end_row && d < D", "d < D"),
    checked("rows past the end are written", "first_row + row < end_row && d < D", "d < D", 1),
    checked(
        "head past the end is written",
        "first_row + row < end_row && d < D",
        "first_row + row < end_row",
        1,
    ),
    values("no scale", "column] * scale", "column]"),
    values(
        "output is not rescaled", "thread_elements()[1] *= rescale", "thread_elements()[1] *= 1.0f"
    ),
    values("sum is not rescaled", "running_sum * factor", "running_sum"),
    values("maximum of half a row", "step < SHARE", "step < SHARE / 2", 1),
    values(
        "last partial tile is left out",
        "last_key - first + 1) + 7) / 8",
        "last_key - first + 1)) / 8",
    ),
    checked("fragment turned over", "queries[at + Q_STRIDE]", "queries[at + 1]"),
    checked(
        "slices of the head overlap",
        "8 * (simdgroup * SLICE + c) + matrix_column",
        "8 * (simdgroup + c) + matrix_column",
    ),
    static("pointer without its memory", "const device T* q_rows", "const T* q_rows"),
]
