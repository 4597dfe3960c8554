"""Bugs for the attention kernels. `check` must find each of them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from helpers.attention_cases import Case, counted, packed
from helpers.emulated import FORWARD_RTOL, assert_close, executed
from metal_cpu import Launch
from planting import Bug

from mlx_rgemma import ops

WINDOW, RING, ROTARY = "windowed_attention.metal", "ring_attention.metal", "rotary.metal"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

BUGS = (
    Bug("no barrier after the queries are loaded", "checked", WINDOW, BARRIER, "", 0),
    Bug("no barrier before the next scores are stored", "checked", WINDOW, BARRIER, "", 1),
    Bug("no barrier before the scores are read", "checked", WINDOW, BARRIER, "", 2),
    Bug("no barrier before the weights are read", "checked", WINDOW, BARRIER, "", 3),
    Bug("no barrier before the last factors are stored", "checked", WINDOW, BARRIER, "", 4),
    Bug("no barrier before the last factors are read", "checked", WINDOW, BARRIER, "", 5),
    Bug("barrier for the wrong memory", "checked", WINDOW, "mem_threadgroup", "mem_device", 2),
    Bug(
        "barrier of a simdgroup",
        "checked",
        WINDOW,
        BARRIER,
        BARRIER.replace("threadgroup", "simdgroup", 1),
        3,
    ),
    Bug("window one key short", "numbers", WINDOW, "key >= oldest", "key > oldest"),
    Bug("query does not see itself", "numbers", WINDOW, "key <= token", "key < token"),
    Bug("query sees the future", "numbers", WINDOW, "key <= token", "key <= last_key"),
    Bug(
        "window instead of reach", "numbers", WINDOW, "metal::min(reach_of_token, window)", "window"
    ),
    Bug(
        "band of the tile without documents",
        "numbers",
        WINDOW,
        "metal::min(lane_reach, window)",
        "1",
    ),
    Bug("band ends too late", "checked", WINDOW, "(end_row - 1) / heads", "end_row / heads"),
    Bug(
        "band starts too late", "numbers", WINDOW, "simd_min(lane_oldest)", "simd_max(lane_oldest)"
    ),
    Bug("keys beyond the ring", "numbers", WINDOW, "-slots)", "-slots - 1)", None),
    Bug("ring turned by one", "numbers", WINDOW, "head + key + slots", "head + key + slots - 1", 0),
    Bug(
        "ring not a circle",
        "numbers",
        WINDOW,
        "head + key < 0 ? head + key + slots : head + key",
        "head + key",
        1,
    ),
    Bug(
        "values of the ring are its keys",
        "numbers",
        WINDOW,
        "ring_keys + static_cast<size_t>(slots) * D",
        "ring_keys",
    ),
    Bug("second row of the ring", "numbers", WINDOW, "batch) * 2 * slots", "batch) * slots"),
    Bug("reach of the first row for all", "numbers", WINDOW, "batch * reach_stride", "0", None),
    Bug(
        "keys past the chunk are read",
        "checked",
        WINDOW,
        "min(first + column + matrix_row, last_key)",
        "max(first + column + matrix_row, first)",
    ),
    Bug(
        "queries past the end are read",
        "checked",
        WINDOW,
        "first_row + row < end_row && d < D",
        "d < D",
        0,
    ),
    Bug(
        "rows past the end are written",
        "checked",
        WINDOW,
        "first_row + row < end_row && d < D",
        "d < D",
        1,
    ),
    Bug(
        "head past the end is written",
        "checked",
        WINDOW,
        "first_row + row < end_row && d < D",
        "first_row + row < end_row",
        1,
    ),
    Bug("no scale", "numbers", WINDOW, "column] * scale", "column]"),
    Bug(
        "output is not rescaled",
        "numbers",
        WINDOW,
        "thread_elements()[1] *= rescale",
        "thread_elements()[1] *= 1.0f",
    ),
    Bug("sum is not rescaled", "numbers", WINDOW, "running_sum * factor", "running_sum"),
    Bug("maximum of half a row", "numbers", WINDOW, "step < SHARE", "step < SHARE / 2", 1),
    Bug(
        "last partial tile is left out",
        "numbers",
        WINDOW,
        "last_key - first + 1) + 7) / 8",
        "last_key - first + 1)) / 8",
    ),
    Bug("fragment turned over", "checked", WINDOW, "queries[at + Q_STRIDE]", "queries[at + 1]"),
    Bug(
        "slices of the head overlap",
        "checked",
        WINDOW,
        "8 * (simdgroup * SLICE + c) + matrix_column",
        "8 * (simdgroup + c) + matrix_column",
    ),
    Bug("no barrier before the parts are merged", "checked", RING, BARRIER, "", 0),
    Bug("no barrier before the next head's parts", "checked", RING, BARRIER, "", 1),
    Bug("token does not see itself", "numbers", RING, "simdgroup == 0 && limit >= 0", "false"),
    Bug(
        "every simdgroup sees the token",
        "numbers",
        RING,
        "simdgroup == 0 && limit >= 0",
        "limit >= 0",
    ),
    Bug("slots one off", "numbers", RING, "visible - 1) + 1;", "visible - 1);"),
    Bug(
        "ring not a circle",
        "checked",
        RING,
        "head - back < 0 ? head - back + slots : head - back",
        "head - back",
    ),
    Bug("slots that the row never wrote", "numbers", RING, "metal::min(limit, slots)", "slots"),
    Bug("last slot of a round counted twice", "numbers", RING, "first + a < visible", "true", None),
    Bug("rotation turned around", "numbers", RING, "first ? -partner", "first ? partner"),
    Bug(
        "partner beyond the head",
        "numbers",
        RING,
        "d + pairs : d - pairs",
        "d + pairs : d + pairs",
        0,
    ),
    Bug("angles of the first row for all", "numbers", RING, "batch * angle_stride", "0"),
    Bug(
        "key stored before its rotation",
        "numbers",
        RING,
        "static_cast<T>(rotated[HEADS][c])",
        "own_key[d]",
    ),
    Bug(
        "every threadgroup stores the key",
        "checked",
        RING,
        "first_head == 0 && simdgroup == 0",
        "simdgroup == 0",
    ),
    Bug(
        "every simdgroup stores the key",
        "checked",
        RING,
        "first_head == 0 && simdgroup == 0",
        "first_head == 0",
    ),
    Bug("parts merged without their weights", "numbers", RING, "part_max[s] - overall", "0.0f"),
    Bug(
        "sums merged without their weights", "numbers", RING, "weight * part_sum[s]", "part_sum[s]"
    ),
    Bug(
        "one simdgroup is not merged",
        "numbers",
        RING,
        "s < SIMDGROUPS; ++s) {\n      const float weight",
        "s < SIMDGROUPS - 1; ++s) {\n      const float weight",
    ),
    Bug(
        "simdgroup sum that not all lanes reach",
        "checked",
        RING,
        "product = metal::simd_sum(product) * scale;",
        "if (lane * CHANNELS < D) {\n  product = metal::simd_sum(product) * scale;\n}",
        0,
    ),
    Bug(
        "channels past the head are stored",
        "checked",
        RING,
        "    if (d < D) {\n      part_output",
        "    if (true) {\n      part_output",
    ),
    Bug(
        "output of the first head for all",
        "checked",
        RING,
        "first_head + n) * D + d",
        "first_head) * D + d",
    ),
    Bug(
        "channels past the token are written",
        "checked",
        ROTARY,
        "channel < (heads + 2) * D",
        "true",
    ),
    Bug("value is rotated", "numbers", ROTARY, "n <= heads && d", "d"),
    Bug("angle of the first token for all", "numbers", ROTARY, "token * pairs", "0"),
    Bug("angles of the first row for all", "numbers", ROTARY, "batch * angle_stride", "0"),
    Bug("keys over values", "checked", ROTARY, "2 + (n - heads)", "2"),
    Bug("rotation turned around", "numbers", ROTARY, ": partner * sine", ": -partner * sine"),
    Bug(
        "pointer without its memory",
        "static",
        WINDOW,
        "const device T* q_rows",
        "const T* q_rows",
    ),
    Bug(
        "a pointer to a tiny array",
        "static",
        RING,
        "const int heads",
        "const device int* sizes = params;\nconst int slot_count = sizes[1];\nconst int heads",
    ),
)

CASES = {
    WINDOW: [
        Case(3, 20, 12, np.concatenate([packed(29, 20, start=9), counted(3, 29)]), 2, 13, 5),
        Case(2, 20, 12, counted(50, 3), slots=7, head=2, bounded=False),
        Case(1, 20, 40, counted(0, 70), bounded=False),
    ],
    RING: [
        Case(3, 20, 70, np.array([[41], [80]]), 2, slots=71, head=5),
        Case(10, 20, 9, counted(6, 1), 8, slots=10),
    ],
    ROTARY: [Case(2, 20, 5, np.array([[3, 4, 5], [7, 0, 1]]), 2)],
}


def check(file: str, mode: str) -> list[Launch]:
    """Run a kernel, and compare with float64."""
    launches: list[Launch] = []
    for case in CASES[file]:
        turned = case.rotated() if file != WINDOW else case
        with executed(mode) as launched:
            if file == WINDOW:
                out = ops.windowed_attention(
                    case.q, case.k, case.v, window=case.window, reach=case.reach, ring=case.ring
                )
            else:
                out, kv = ops.prefill_attention(
                    *(case.q, case.k, case.v, *case.angles()),
                    window=case.window,
                    reach=case.reach,
                    ring=case.ring,
                )
                assert mx.array_equal(kv, mx.concatenate([turned.k, turned.v], axis=1))
            assert_close("out", out, turned.expected(), FORWARD_RTOL)
        launches += launched[:1]
    return launches
