"""Mutants of `rotary.metal`."""

from metal_emulator.mutation import checked, values

MUTANTS = [
    checked("channels past the token are written", "channel < (heads + 2) * D", "true"),
    values("value is rotated", "n <= heads && d", "d"),
    values("angle of the first token for all", "token * pairs", "0"),
    values("angles of the first row for all", "batch * angle_stride", "0"),
    checked("keys over values", "2 + (n - heads)", "2"),
    values("rotation turned around", ": partner * sine", ": -partner * sine"),
]
