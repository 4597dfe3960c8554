"""Mutants of `decode_attention.metal`."""

from metal_emulator.mutation import checked, static, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier before the parts are merged", BARRIER, ""),
    checked("no barrier before the next head's parts", BARRIER, "", 1),
    values("token does not see itself", "simdgroup == 0 && limit >= 0", "false"),
    values("every simdgroup sees the token", "simdgroup == 0 && limit >= 0", "limit >= 0"),
    values("slots one off", "visible - 1) + 1;", "visible - 1);"),
    checked(
        "ring not a circle",
        "write_pos - back < 0 ? write_pos - back + slots : write_pos - back",
        "write_pos - back",
    ),
    values("slots that the row never wrote", "metal::min(limit, slots)", "slots"),
    values("last slot of a round counted twice", "first + a < visible", "true", None),
    values("rotation turned around", "first ? -partner", "first ? partner"),
    values("partner beyond the head", "d + pairs : d - pairs", "d + pairs : d + pairs"),
    values("angles of the first row for all", "batch * angle_stride", "0"),
    values("key stored before its rotation", "static_cast<T>(rotated[HEADS][c])", "own_key[d]"),
    checked(
        "every threadgroup stores the key", "first_head == 0 && simdgroup == 0", "simdgroup == 0"
    ),
    checked(
        "every simdgroup stores the key", "first_head == 0 && simdgroup == 0", "first_head == 0"
    ),
    values("parts merged without their weights", "part_max[s] - overall", "0.0f"),
    values("sums merged without their weights", "weight * part_sum[s]", "part_sum[s]"),
    values(
        "one simdgroup is not merged",
        "s < SIMDGROUPS; ++s) {\n      const float weight",
        "s < SIMDGROUPS - 1; ++s) {\n      const float weight",
    ),
    checked(
        "simdgroup sum that not all lanes reach",
        "product = metal::simd_sum(product) * scale;",
        "if (lane * CHANNELS < D) {\n  product = metal::simd_sum(product) * scale;\n}",
    ),
    checked(
        "channels past the head are stored",
        "    if (d < D) {\n      part_output",
        "    if (true) {\n      part_output",
    ),
    checked("output of the first head for all", "first_head + n) * D + d", "first_head) * D + d"),
    static(
        "a pointer to a tiny array",
        "const int heads",
        "const device int* sizes = params;\nconst int slot_count = sizes[1];\nconst int heads",
    ),
]
