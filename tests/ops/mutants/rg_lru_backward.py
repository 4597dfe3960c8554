"""Mutants of `rg_lru_backward.metal`."""

from metal_emulator.mutation import checked, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier", BARRIER, ""),
    checked("no barrier before the sums", BARRIER, "", 1),
    checked("one set of buffers for all tiles", "set = 1 - set;", ""),
    checked("sums over a set in use", "const uint mine = set", "const uint mine = (1 - set)", 1),
    values(
        "no bound on the square root's derivative",
        "metal::min(1.0f / metal::max(m[k], 1e-30f), 2000.0f)",
        "1.0f / metal::max(m[k], 1e-30f)",
        case="saturated",
    ),
    values("half the bound", "2000.0f", "1000.0f", case="saturated"),
    values("a in place of a^2", "value[k] * a[k] * slope", "value[k] * slope"),
    values(
        "state after the step, not before",
        "previous[k] = h;\n    h = a[k] * h + m[k] * gate_i[k] * value[k];",
        "h = a[k] * h + m[k] * gate_i[k] * value[k];\n    previous[k] = h;",
    ),
    values("gradient enters a simdgroup late", "s == int(split) ?", "s + 1 == int(split) ?"),
    values("first step of a simdgroup left out", "k = STEPS - 1; k >= 0", "k = STEPS - 1; k > 0"),
    checked("starts one tile too late", "(length - 1) / tile", "length / tile", case="whole tiles"),
    values(
        "gradient of the last state ignored",
        "float after = dh_last[row * width + d];",
        "float after = 0.0f;",
    ),
    values("padding has a gate", "gate_r[k] = what[k] == 2 ? 0.0f : r;", "gate_r[k] = r;"),
    values("padding has an input", "gate_i[k] = what[k] == 2 ? 0.0f :", "gate_i[k] ="),
    values("tail has a gradient", "g[k] = first + k < length ? g[k] : 0.0f;", ""),
    values("entry of the first tile for all", "uint(start) / CHUNK", "0u"),
    values("sum of the last step only", "sum_r += d_r;", "sum_r = d_r;"),
    values("one simdgroup's sum missing", "s < splits; ++s", "s + 1 < splits; ++s"),
    checked("rows overlap in the sums", "row * 3 * width", "row * 2 * width"),
    values("softplus's derivative forgotten", "-8.0f * sigmoid(lambda) *", "-8.0f *"),
    checked("stores beyond the end", "if (writes && first + k < length)", "if (writes)"),
    values(
        "gradient of the wrong gate",
        "d_input_gate[at] = static_cast<G>(d_i)",
        "d_input_gate[at] = static_cast<G>(d_r)",
    ),
]
