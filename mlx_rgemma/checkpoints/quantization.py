"""MLX's quantizations: which there are, what a user may ask for, what a file turns out to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.io.safetensors import TensorInfo

MODES = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}
"""Group sizes and bits of each mode; the first of each is its default."""

PACKED_TOGETHER = 32
"""Weights that MLX packs in one go, also where a group is smaller."""

READ_ONLY_BITS = (1,)
"""Affine bits that MLX runs and `convert` does not offer: too coarse for this model."""

SCALE_DTYPES = {
    "affine": ("F32", "BF16", "F16"),
    "mxfp4": ("U8",),
    "nvfp4": ("U8",),
    "mxfp8": ("U8",),
}


@dataclass(frozen=True)
class Quantization:
    """How a matrix is quantized: groups of `group_size` weights share a scale."""

    group_size: int
    bits: int
    mode: str = "affine"

    @classmethod
    def choose(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> Quantization:
        """A quantization with the mode's defaults for what is not given.

        Raises:
            UserError: Naming the values that are possible.
        """
        if mode not in MODES:
            raise UserError(f"q-mode is {shown(mode)}, expected one of {', '.join(MODES)}.")
        group_sizes, all_bits = MODES[mode]
        bits = all_bits[0] if bits is None else bits
        group_size = group_sizes[0] if group_size is None else group_size
        for name, value, possible in (
            ("q-bits", bits, all_bits),
            ("q-group-size", group_size, group_sizes),
        ):
            if value not in possible:
                choice = ", ".join(str(v) for v in sorted(possible))
                one_of = "one of " if len(possible) > 1 else ""
                raise UserError(
                    f"{name} is {shown(value)}; with q-mode {mode} it must be {one_of}{choice}."
                )
        return cls(group_size, bits, mode)

    @classmethod
    def of_tensors(
        cls, shape: tuple[int, ...], weight: TensorInfo, scales: TensorInfo
    ) -> Quantization | None:
        """What a matrix of `shape` was packed with, or None if its tensors fit nothing."""
        rows, columns = shape
        if len(weight.shape) != 2 or len(scales.shape) != 2 or weight.dtype != "U32":
            return None
        if weight.shape[0] != rows or scales.shape[0] != rows or 0 in scales.shape + weight.shape:
            return None
        if columns % scales.shape[1] or weight.shape[1] * 32 % columns:
            return None
        group_size, bits = columns // scales.shape[1], weight.shape[1] * 32 // columns
        for mode, (group_sizes, all_bits) in MODES.items():
            if mode == "affine":
                all_bits += READ_ONLY_BITS
            if (
                scales.dtype in SCALE_DTYPES[mode]
                and group_size in group_sizes
                and bits in all_bits
            ):
                return cls(group_size, bits, mode)
        return None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether MLX can quantize a matrix: its rows must be an integer of groups."""
        return shape[-1] % max(self.group_size, PACKED_TOGETHER) == 0

    def packed(self, path: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """The tensors of a quantized matrix.

        Args:
            path: Name of its module.
            shape: Its shape, unquantized.
            dtype: dtype of the scales, where the mode leaves a choice.
        """
        rows, columns = shape
        groups = (rows, columns // self.group_size)
        weight = TensorInfo(f"{path}.weight", "U32", (rows, columns * self.bits // 32))
        if self.mode != "affine":
            return weight, TensorInfo(f"{path}.scales", "U8", groups)
        return (
            weight,
            TensorInfo(f"{path}.scales", dtype, groups),
            TensorInfo(f"{path}.biases", dtype, groups),
        )

    def as_dict(self) -> dict[str, Any]:
        """As `config.json` has it, and `nn.quantize` takes it."""
        return asdict(self)


def agrees(found: Quantization, written: Any) -> bool:
    """Return whether a layer's own entry in `config.json` says what the file holds.

    A missing entry or key says nothing. mlx-lm's mixed recipes write null for the group size (and
    may for the bits): the mode's default, as `mx.quantize` takes it.
    """
    if written is None:
        return True
    if not isinstance(written, Mapping):
        return bool(written)
    group_sizes, all_bits = MODES[found.mode]
    defaults = {"group_size": group_sizes[0], "bits": all_bits[0]}
    for key, value in found.as_dict().items():
        said = written.get(key, value)
        if (defaults.get(key) if said is None else said) != value:
            return False
    return True
