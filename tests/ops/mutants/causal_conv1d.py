"""Mutants of `causal_conv1d.metal`."""

from metal_emulator.mutation import checked, values

MUTANTS = [
    values("taps in reverse", "taps[K - 1 - j] * window", "taps[j] * window"),
    values("documents run together", "position >= j ?", "true ?"),
    values("one tap too few at a border", "position >= j ?", "position > j ?"),
    checked(
        "state one row early",
        "state[past + uint(t + K - 1) * width]",
        "state[past + uint(t + K - 2) * width]",
    ),
    checked("state of the first row", "row * uint(K - 1) * width + channel", "channel"),
    values("bias forgotten", "float sum = offset;", "float sum = 0.0f;"),
    checked("lanes beyond the width run", "channel >= width || ", ""),
    checked("loads beyond the end", "metal::min(first + k, length - 1)", "first + k"),
    values("state of an earlier document kept", "same_document ? kept : 0.0f", "kept"),
    values("age of the state off by one", "K - 2 - k;", "K - 1 - k;"),
    values("rows without tokens lose their state", "real == 0 || ", ""),
    checked("all threads write the state", "if (first == 0) {", "{"),
    values("lengths of the first row for all", "row * uint(dims[5])", "0"),
]
