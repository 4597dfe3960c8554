"""Mutants of `recurrent_decode.metal`."""

from metal_emulator.mutation import checked, static, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier after the convolution", BARRIER, ""),
    checked("no barrier before the parts are added", BARRIER, "", 1),
    checked("no barrier before the next row's parts", BARRIER, "", 2),
    checked("barrier for the wrong memory", "mem_threadgroup", "mem_device", 1),
    values("taps in the wrong order", "past[j] * tap[j]", "past[j] * tap[MEMORY - 1 - j]"),
    values("no bias of the convolution", "static_cast<float>(conv_bias[d]) + now", "now"),
    values("taps reach into the last document", "what == 1 ? 0.0f : past[j]", "past[j]"),
    values("padding enters the convolution", "what == 2 ? past[j] : next", "next"),
    values("convolution is not rounded", "static_cast<float>(static_cast<T>(sum))", "sum"),
    values("state of the first row for all", "(entry * MEMORY + j) * width", "j * width"),
    checked("state in the wrong place", "(entry * MEMORY + j) * width", "j * width", 1),
    checked(
        "every tile stores the state", "i >= first_column && i < first_column + COLUMNS", "true"
    ),
    checked("rows past the batch are read", "if (entry < batch_size) {", "if (true) {"),
    checked(
        "rows past the batch are written", "if (entry < batch_size && i < BLOCK)", "if (i < BLOCK)"
    ),
    checked(
        "columns past the block are written",
        "if (entry < batch_size && i < BLOCK)",
        "if (entry < batch_size)",
    ),
    checked("rows without a token are not cleared", "inputs[n] = 0.0f;", ""),
    checked(
        "rows without a batch entry are not cleared",
        "      inputs[(row + t) * BLOCK + i] = 0.0f;",
        "",
    ),
    checked("weights past the block", "i < BLOCK && column < BLOCK", "column < BLOCK"),
    values("weights of the first head for all", "(first_channel + i) * BLOCK", "i * BLOCK"),
    values(
        "weights turned over",
        "(first_channel + i) * BLOCK + column",
        "(first_channel + column) * BLOCK + i",
    ),
    values(
        "gates exchanged",
        "product_r[m][c] += value * weight_r",
        "product_r[m][c] += value * weight_i",
    ),
    values("input of the wrong row", "inputs[m * BLOCK + i]", "inputs[i]"),
    values("one simdgroup is not added", "s < SIMDGROUPS", "s < SIMDGROUPS - 1"),
    checked("parts of a row overwrite another's", "gates[m * 2 * COLUMNS + n]", "gates[n]"),
    values("no bias of a gate", " + static_cast<float>(recurrent_bias[d])", ""),
    values("gates of the first token for all", "(row + t) * 2 * COLUMNS", "row * 2 * COLUMNS"),
    values("a reset keeps the state", "what == 1 ? 0.0f : a * state", "a * state"),
    values("a reset keeps the multiplier", "what == 1 ? 1.0f : metal", "metal"),
    values("padding changes the state", "what == 2 ? state : kept + input", "kept + input"),
    values(
        "no square root",
        "metal::precise::sqrt(one_minus_square(log_a, a))",
        "one_minus_square(log_a, a)",
    ),
    values("sign of the rate", "rate = -8.0f", "rate = 8.0f"),
    values("type of the first row for all", "entry * type_row + t", "t", None),
    values("type of the first token for all", "t * type_step", "0", 1),
    values("gelu without its cubic term", "0.044715f", "0.0f"),
    values(
        "branches exchanged", "static_cast<float>(y_branch[at])", "static_cast<float>(x_branch[at])"
    ),
    checked(
        "output of the wrong token",
        "(entry * steps + t) * width + d;\n      const float y",
        "entry * steps * width + d;\n      const float y",
    ),
    values(
        "state before the last step",
        "h[entry * width + d] = state;",
        "h[entry * width + d] = h0[entry * width + d];",
    ),
    static(
        "pointer without its memory",
        "const int width = params[2];",
        "const float* memory = h0;\nconst int width = params[2] + (memory == h0 ? 0 : 1);",
    ),
    static("double precision", "float sum = 0.0f;", "double sum = 0.0;"),
]
