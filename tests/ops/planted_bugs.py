"""Small edits that break a kernel, and the inputs on which one must notice.

Each is a slip that the author of such a kernel makes. `numbers` are wrong in any order of threads.
`checked` finds a race, an access out of bounds, an output unwritten or written twice, a divergent
barrier: numbers alone may come out right, on this machine or in this order.
"""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """One edit of a source: the first `old` after `after` becomes `new`.

    Attributes:
        caught_by: `numbers` or `checked`.
        file: Of `metal/`; the kernel's own when empty.
        case: The inputs that show it.
    """

    caught_by: str
    name: str
    old: str
    new: str
    after: str = ""
    file: str = ""
    case: str = "example"

    def edit(self, text: str) -> str:
        """The source with the bug in it."""
        place = text.index(self.old, text.index(self.after) + len(self.after))
        return text[:place] + self.new + text[place + len(self.old) :]


def numbers(*edit: str, **where: str) -> Bug:
    return Bug("numbers", *edit, **where)


def checked(*edit: str, **where: str) -> Bug:
    return Bug("checked", *edit, **where)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
LAST = "metal::min(first + k, length - 1)"
KIND = "int(kind[row * uint(dims[2]) + uint(t) * uint(dims[3])])"

# fmt: off
BUGS: dict[str, list[Bug]] = {
    "rg_lru": [
        checked("no barrier", BARRIER, ""),
        checked("barrier of a simdgroup only", "threadgroup_barrier", "simdgroup_barrier"),
        checked("barrier for other memory", BARRIER, BARRIER.replace("_threadgroup)", "_device)")),
        checked("one set of buffers for all tiles", "set = 1 - set;", ""),
        checked("too little threadgroup memory", "products[2 *", "products[1 *"),
        numbers("state enters a simdgroup late", "s == split ?", "s == split + 1 ?"),
        numbers("last simdgroup left out", "s < splits; ++s", "s + 1 < splits; ++s"),
        checked("all simdgroups write h_last", "if (split == 0 && writes)", "if (writes)"),
        numbers("h_last from one simdgroup's product", "] = h;", "] = products[0];"),
        checked("loads beyond the end", LAST, "first + k"),
        checked("stores beyond the end", "if (first + k < length)", "if (true)"),
        numbers("tail is not neutral", "what[k] = first + k < length ? what[k] : 2;", ""),
        checked("lanes beyond the width write", "channel < width;", "true;"),
        checked("lanes beyond the width load", "metal::min(channel, width - 1)", "channel"),
        checked("rows share their memory", "ulong(row) * ulong(length)", "ulong(length)"),
        numbers("a reset keeps the coefficient", "(what[k] == 1 ? 0.0f : 1.0f)", "a"),
        numbers("a reset keeps the multiplier", "multiplier = what[k] == 0 ? multiplier : 1.0f;",
            ""),
        numbers("padding adds its input", "what[k] == 2 ? 0.0f : v", "v"),
        numbers("kinds of another row", KIND, KIND.replace("row", "0u")),
        checked("bias step ignored", "d * uint(dims[4])", "d", case="no biases"),
        numbers("bias forgotten", "gate_i[k] + bias_i", "gate_i[k]"),
        numbers("no square root", "metal::precise::sqrt(one_minus_square(log_a, a))",
            "one_minus_square(log_a, a)"),
        checked("entry of the tile, not of the segment", "uint(first) / SEGMENT",
            "uint(start) / SEGMENT"),
        numbers("product restarts", "all *= a;", "all = a;"),
        numbers("output assembled in its own precision",
            "static_cast<T>(product[k] * entering + partial[k])",
            "static_cast<T>(static_cast<T>(product[k] * entering) + static_cast<T>(partial[k]))",
            case="bf16"),
        numbers("coefficient in the output's precision", "float a = metal::precise::exp(log_a);",
            "float a = static_cast<float>(static_cast<T>(metal::precise::exp(log_a)));",
            case="bf16"),
        numbers("1 - a^2 by subtraction", "z > -0.5f ?", "false ?", case="saturated",
            file="common.metal"),
        numbers("log(1 + u) by addition", "2.0f * s * series", "metal::precise::log(1.0f + u)",
            case="saturated", file="common.metal"),
        numbers("sigmoid's sign", "metal::precise::exp(-x)", "metal::precise::exp(x)",
            file="common.metal"),
    ],
    "rg_lru_backward": [
        checked("no barrier", BARRIER, ""),
        checked("no barrier before the sums", BARRIER, "", after="// The set that"),
        checked("one set of buffers for all tiles", "set = 1 - set;", ""),
        checked("sums over a set in use", "const uint mine = set", "const uint mine = (1 - set)",
            after="// The set that"),
        numbers("no bound on the square root's derivative",
            "metal::min(1.0f / metal::max(m[k], 1e-30f), 2000.0f)",
            "1.0f / metal::max(m[k], 1e-30f)", case="saturated"),
        numbers("half the bound", "2000.0f", "1000.0f", case="saturated"),
        numbers("a in place of a^2", "value[k] * a[k] * slope", "value[k] * slope"),
        numbers("state after the step, not before",
            "previous[k] = h;\n    h = a[k] * h + m[k] * gate_i[k] * value[k];",
            "h = a[k] * h + m[k] * gate_i[k] * value[k];\n    previous[k] = h;"),
        numbers("gradient enters a simdgroup late", "s == int(split) ?", "s + 1 == int(split) ?"),
        numbers("first step of a simdgroup left out", "k = STEPS - 1; k >= 0",
            "k = STEPS - 1; k > 0"),
        checked("starts one tile too late", "(length - 1) / tile", "length / tile",
            case="whole tiles"),
        numbers("gradient of the last state ignored", "float after = dh_last[row * width + d];",
            "float after = 0.0f;"),
        numbers("padding has a gate", "gate_r[k] = what[k] == 2 ? 0.0f : r;", "gate_r[k] = r;"),
        numbers("padding has an input", "gate_i[k] = what[k] == 2 ? 0.0f :", "gate_i[k] ="),
        numbers("tail has a gradient", "g[k] = first + k < length ? g[k] : 0.0f;", ""),
        numbers("entry of the first tile for all", "uint(start) / SEGMENT", "0u"),
        numbers("sum of the last step only", "sum_r += d_r;", "sum_r = d_r;"),
        numbers("one simdgroup's sum missing", "s < splits; ++s", "s + 1 < splits; ++s"),
        checked("rows overlap in the sums", "row * 3 * width", "row * 2 * width"),
        numbers("softplus's derivative forgotten", "-8.0f * sigmoid(lambda) *", "-8.0f *"),
        checked("stores beyond the end", "if (writes && first + k < length)", "if (writes)"),
        numbers("gradient of the wrong gate", "d_input_gate[at] = static_cast<G>(d_i)",
            "d_input_gate[at] = static_cast<G>(d_r)"),
    ],
    "linear_scan": [
        checked("no barrier", BARRIER, ""),
        numbers("reset ignored", "restart ? 0.0f : product[k]", "product[k]"),
        numbers("tail drops the state", "product[k]) : 1.0f", "product[k]) : 0.0f"),
        numbers("product before the sum that needs it",
            "partial[k] += product[k] * partial[k - 1];\n    product[k] *= product[k - 1];",
            "product[k] *= product[k - 1];\n    partial[k] += product[k] * partial[k - 1];"),
        numbers("initial state ignored", "float h = h0[row * width + d];", "float h = 0.0f;"),
        checked("h_last of half the lanes", "if (split == 0 && writes)",
            "if (split == 0 && writes && lane < 16)"),
        numbers("a step skipped at each simdgroup", "int k = 1; k < STEPS", "int k = 2; k < STEPS"),
        checked("stores one step late", "y[base + ulong(first + k)",
            "y[base + ulong(first + k + 1)"),
    ],
    "linear_scan_backward": [
        checked("no barrier", BARRIER, ""),
        numbers("a reset has a gradient", "restart[k] ? 0.0f : h", "h"),
        numbers("coefficient of the wrong step", "reverse = coefficient[k] * (g[k] + reverse)",
            "reverse = g[k] + coefficient[k] * reverse"),
        numbers("simdgroups in the wrong direction", "int s = int(splits) - 1; s >= 0; --s",
            "int s = 0; s < int(splits); ++s"),
        numbers("dh0 before the first step", "dh0[row * width + d] = after;",
            "dh0[row * width + d] = dh_last[row * width + d];"),
        checked("lanes beyond the width write", "channel < width;", "true;"),
    ],
    "causal_conv1d": [
        numbers("taps in reverse", "taps[K - 1 - j] * window", "taps[j] * window"),
        numbers("documents run together", "position >= j ?", "true ?"),
        numbers("one tap too few at a border", "position >= j ?", "position > j ?"),
        checked("state one row early", "state[past + uint(t + K - 1) * width]",
            "state[past + uint(t + K - 2) * width]"),
        checked("state of the first row", "row * uint(K - 1) * width + channel", "channel"),
        numbers("bias forgotten", "float sum = offset;", "float sum = 0.0f;"),
        checked("lanes beyond the width run", "channel >= width || ", ""),
        checked("loads beyond the end", LAST, "first + k"),
        numbers("state of an earlier document kept", "same_document ? kept : 0.0f", "kept"),
        numbers("age of the state off by one", "K - 2 - k;", "K - 1 - k;"),
        numbers("rows without tokens lose their state", "real == 0 || ", ""),
        checked("all threads write the state", "if (first == 0) {", "{"),
        numbers("lengths of the first row for all", "row * uint(dims[5])", "0"),
    ],
    "causal_conv1d_backward": [
        checked("no barrier", BARRIER, ""),
        checked("lanes return before the barrier", "const uint d = ",
            "if (!writes) { return; }\nconst uint d = "),
        numbers("gradient of the state forgotten",
            "sum += static_cast<float>(d_new_state[past + uint(kept) * width]);", "",
            after="const int t = first + k;\n    float sum"),
        checked("state given on to padding", "t < real && ", ""),
        numbers("documents run together", "reach[k + j] >= j ?", "true ?",
            after="const int t = first + k;\n    float sum"),
        numbers("weights learn across documents", "reach[k] >= j ?", "true ?"),
        checked("all threads write the state", "if (first == 0) {\n      dstate",
            "{\n      dstate"),
        checked("rows overlap in the sums", "row * threadgroups_per_grid.y + ", ""),
        numbers("tail counts for the bias", "g[k] = first + k < length ? g[k] : 0.0f;", ""),
        numbers("one simdgroup's sum missing", "s < groups; ++s", "s + 1 < groups; ++s"),
    ],
}
