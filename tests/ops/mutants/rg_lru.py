"""Mutants of `rg_lru.metal`."""

from metal_emulator.mutation import checked, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier", BARRIER, ""),
    checked("barrier of a simdgroup only", "threadgroup_barrier", "simdgroup_barrier"),
    checked("barrier for other memory", BARRIER, "threadgroup_barrier(mem_flags::mem_device);"),
    checked("one set of buffers for all tiles", "set = 1 - set;", ""),
    checked("too little threadgroup memory", "products[2 *", "products[1 *"),
    values("state enters a simdgroup late", "s == split ?", "s == split + 1 ?"),
    values("last simdgroup left out", "s < splits; ++s", "s + 1 < splits; ++s"),
    checked("all simdgroups write h_last", "if (split == 0 && writes)", "if (writes)"),
    values("h_last from one simdgroup's product", "] = h;", "] = products[0];"),
    checked("loads beyond the end", "metal::min(first + k, length - 1)", "first + k"),
    checked("stores beyond the end", "if (first + k < length)", "if (true)"),
    values("tail is not neutral", "what[k] = first + k < length ? what[k] : 2;", ""),
    checked("lanes beyond the width write", "channel < width;", "true;"),
    checked("lanes beyond the width load", "metal::min(channel, width - 1)", "channel"),
    checked("rows share their memory", "ulong(row) * ulong(length)", "ulong(length)"),
    values("a reset keeps the coefficient", "(what[k] == 1 ? 0.0f : 1.0f)", "a"),
    values("a reset keeps the multiplier", "multiplier = what[k] == 0 ? multiplier : 1.0f;", ""),
    values("padding adds its input", "what[k] == 2 ? 0.0f : v", "v"),
    values(
        "types of another row",
        "int(token_type[row * uint(dims[2]) + uint(t) * uint(dims[3])])",
        "int(token_type[0u * uint(dims[2]) + uint(t) * uint(dims[3])])",
    ),
    checked("bias step ignored", "d * uint(dims[4])", "d", case="no biases"),
    values("bias forgotten", "gate_i[k] + bias_i", "gate_i[k]"),
    values(
        "no square root",
        "metal::precise::sqrt(one_minus_square(log_a, a))",
        "one_minus_square(log_a, a)",
    ),
    checked("state of the tile, not of the chunk", "uint(first) / CHUNK", "uint(start) / CHUNK"),
    values("product restarts", "all *= a;", "all = a;"),
    values(
        "output assembled in its own precision",
        "static_cast<T>(product[k] * entering + partial[k])",
        "static_cast<T>(static_cast<T>(product[k] * entering) + static_cast<T>(partial[k]))",
        case="bf16",
    ),
    values(
        "coefficient in the output's precision",
        "float a = metal::precise::exp(log_a);",
        "float a = static_cast<float>(static_cast<T>(metal::precise::exp(log_a)));",
        case="bf16",
    ),
    values(
        "1 - a^2 by subtraction", "z > -0.5f ?", "false ?", file="common.metal", case="saturated"
    ),
    values(
        "log(1 + u) by addition",
        "2.0f * s * series",
        "metal::precise::log(1.0f + u)",
        file="common.metal",
        case="saturated",
    ),
    values(
        "sigmoid's sign", "metal::precise::exp(-x)", "metal::precise::exp(x)", file="common.metal"
    ),
]
