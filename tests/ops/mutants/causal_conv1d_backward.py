"""Mutants of `causal_conv1d_backward.metal`."""

from metal_emulator.mutation import checked, values

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = [
    checked("no barrier", BARRIER, ""),
    checked(
        "lanes return before the barrier",
        "const uint d = ",
        "if (!writes) { return; }\nconst uint d = ",
    ),
    values(
        "gradient of the state forgotten",
        "sum += static_cast<float>(d_new_state[past + uint(kept) * width]);",
        "",
        1,
    ),
    checked("state given on to padding", "t < real && ", ""),
    values("documents run together", "reach[k + j] >= j ?", "true ?", 1),
    values("weights learn across documents", "reach[k] >= j ?", "true ?"),
    checked("all threads write the state", "if (first == 0) {\n      dstate", "{\n      dstate"),
    checked("rows overlap in the sums", "row * threadgroups_per_grid.y + ", ""),
    values("tail counts for the bias", "g[k] = first + k < length ? g[k] : 0.0f;", ""),
    values("one simdgroup's sum missing", "s < groups; ++s", "s + 1 < groups; ++s"),
]
