"""Mutants of `add_rms_norm.metal`."""

from metal_emulator.mutation import checked, static, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier", BARRIER, ""),
    values("delta is not added", " + static_cast<float>(delta[at])", ""),
    values(
        "norm of the stream, not of the sum",
        "static_cast<float>(sum[at]) * scale",
        "static_cast<float>(x[at]) * scale",
    ),
    values(
        "mean of the stream, not of the sum",
        "square += static_cast<float>(value) * static_cast<float>(value)",
        "square += static_cast<float>(x[at]) * static_cast<float>(x[at])",
    ),
    values(
        "sum rounded to the norm's type",
        "static_cast<S>(static_cast<float>(x[at]) + static_cast<float>(delta[at]))",
        "static_cast<S>(static_cast<T>(static_cast<float>(x[at]) + static_cast<float>(delta[at])))",
    ),
    checked("sum is not stored", "sum[at] = value;", ""),
    values(
        "factor without 1", "1.0f + static_cast<float>(weight[n])", "static_cast<float>(weight[n])"
    ),
    checked("channels past the row", "n < width", "n <= width"),
    static("implicit rounding", "normalized[at] = static_cast<T>(", "normalized[at] = ("),
]
