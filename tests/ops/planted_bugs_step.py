"""Bugs for the decode step of the recurrent block. `check` must find each of them."""

from __future__ import annotations

import mlx.core as mx
from helpers.emulated import FORWARD_RTOL, assert_close, executed
from metal_cpu import Launch
from planting import Bug
from helpers.recurrent_decode_cases import Case

from mlx_rgemma import ops

STEP = "recurrent_decode.metal"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

BUGS = (
    Bug("no barrier after the convolution", "checked", STEP, BARRIER, "", 0),
    Bug("no barrier before the parts are added", "checked", STEP, BARRIER, "", 1),
    Bug("no barrier before the next row's parts", "checked", STEP, BARRIER, "", 2),
    Bug("barrier for the wrong memory", "checked", STEP, "mem_threadgroup", "mem_device", 1),
    Bug(
        "taps in the wrong order",
        "numbers",
        STEP,
        "past[j] * tap[j]",
        "past[j] * tap[MEMORY - 1 - j]",
    ),
    Bug(
        "no bias of the convolution",
        "numbers",
        STEP,
        "static_cast<float>(conv_bias[d]) + now",
        "now",
    ),
    Bug(
        "taps reach into the last document",
        "numbers",
        STEP,
        "what == 1 ? 0.0f : past[j]",
        "past[j]",
    ),
    Bug("padding enters the convolution", "numbers", STEP, "what == 2 ? past[j] : next", "next"),
    Bug(
        "convolution is not rounded",
        "numbers",
        STEP,
        "static_cast<float>(static_cast<T>(sum))",
        "sum",
    ),
    Bug(
        "state of the first row for all",
        "numbers",
        STEP,
        "(entry * MEMORY + j) * width",
        "j * width",
        0,
    ),
    Bug(
        "state in the wrong place", "checked", STEP, "(entry * MEMORY + j) * width", "j * width", 1
    ),
    Bug(
        "every tile stores the state",
        "checked",
        STEP,
        "i >= first_column && i < first_column + COLUMNS",
        "true",
    ),
    Bug(
        "rows past the batch are read", "checked", STEP, "if (entry < batch_size) {", "if (true) {"
    ),
    Bug(
        "rows past the batch are written",
        "checked",
        STEP,
        "if (entry < batch_size && i < BLOCK)",
        "if (i < BLOCK)",
    ),
    Bug(
        "columns past the block are written",
        "checked",
        STEP,
        "if (entry < batch_size && i < BLOCK)",
        "if (entry < batch_size)",
    ),
    Bug("rows without a token are not cleared", "checked", STEP, "inputs[n] = 0.0f;", ""),
    Bug(
        "rows without a batch entry are not cleared",
        "checked",
        STEP,
        "      inputs[(row + t) * BLOCK + i] = 0.0f;",
        "",
    ),
    Bug("weights past the block", "checked", STEP, "i < BLOCK && column < BLOCK", "column < BLOCK"),
    Bug(
        "weights of the first head for all",
        "numbers",
        STEP,
        "(first_channel + i) * BLOCK",
        "i * BLOCK",
    ),
    Bug(
        "weights turned over",
        "numbers",
        STEP,
        "(first_channel + i) * BLOCK + column",
        "(first_channel + column) * BLOCK + i",
    ),
    Bug(
        "gates exchanged",
        "numbers",
        STEP,
        "product_r[m][c] += value * weight_r",
        "product_r[m][c] += value * weight_i",
    ),
    Bug("input of the wrong row", "numbers", STEP, "inputs[m * BLOCK + i]", "inputs[i]"),
    Bug("one simdgroup is not added", "numbers", STEP, "s < SIMDGROUPS", "s < SIMDGROUPS - 1"),
    Bug(
        "parts of a row overwrite another's",
        "checked",
        STEP,
        "gates[m * 2 * COLUMNS + n]",
        "gates[n]",
    ),
    Bug("no bias of a gate", "numbers", STEP, " + static_cast<float>(recurrent_bias[d])", ""),
    Bug(
        "gates of the first token for all",
        "numbers",
        STEP,
        "(row + t) * 2 * COLUMNS",
        "row * 2 * COLUMNS",
    ),
    Bug("a reset keeps the state", "numbers", STEP, "what == 1 ? 0.0f : a * state", "a * state"),
    Bug("a reset keeps the multiplier", "numbers", STEP, "what == 1 ? 1.0f : metal", "metal"),
    Bug(
        "padding changes the state",
        "numbers",
        STEP,
        "what == 2 ? state : kept + input",
        "kept + input",
    ),
    Bug(
        "no square root",
        "numbers",
        STEP,
        "metal::precise::sqrt(one_minus_square(log_a, a))",
        "one_minus_square(log_a, a)",
    ),
    Bug("sign of the rate", "numbers", STEP, "rate = -8.0f", "rate = 8.0f"),
    Bug("kind of the first row for all", "numbers", STEP, "entry * kind_row + t", "t", None),
    Bug("kind of the first token for all", "numbers", STEP, "t * kind_step", "0", 1),
    Bug("gelu of the logistic kind", "numbers", STEP, "0.044715f", "0.0f"),
    Bug(
        "branches exchanged",
        "numbers",
        STEP,
        "static_cast<float>(y_branch[at])",
        "static_cast<float>(x_branch[at])",
    ),
    Bug(
        "output of the wrong token",
        "checked",
        STEP,
        "(entry * steps + t) * width + d;\n      const float y",
        "entry * steps * width + d;\n      const float y",
    ),
    Bug(
        "state before the last step",
        "numbers",
        STEP,
        "h[entry * width + d] = state;",
        "h[entry * width + d] = h0[entry * width + d];",
    ),
    Bug(
        "pointer without its memory",
        "static",
        STEP,
        "const int width = params[2];",
        "const float* memory = h0;\nconst int width = params[2] + (memory == h0 ? 0 : 1);",
    ),
    Bug("double precision", "static", STEP, "float sum = 0.0f;", "double sum = 0.0;"),
)

CASES = (
    Case(3, 3, block=18, kind=[[0, 1, 0], [0, 0, 0], [0, 2, 2]]),
    Case(9, 1, kind=[[n % 3] for n in range(9)]),
    Case(1, 2, block=40, dtype=mx.bfloat16, weight_dtype=mx.float32),
)


def check(file: str, mode: str) -> list[Launch]:
    """Run the kernel, and compare with float64."""
    assert file == STEP
    launches: list[Launch] = []
    for case in CASES:
        with executed(mode) as launched:
            results = ops.recurrent_decode(*case.arrays)
            mx.eval(results)
        launches += launched
        for (name, exact), value in zip(case.expected().items(), results, strict=True):
            assert_close(name, value, exact, FORWARD_RTOL)
    return launches
