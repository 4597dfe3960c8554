"""MLX's quantization modes, their detection in files, and recipes that choose bits per matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.griffin.parameters import MODULES
from mlx_rgemma.io.safetensors import TensorInfo

MODES = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}
"""Group sizes and bits of each mode; the first of each is its default."""

PACKED_TOGETHER = 32
"""Weights that MLX packs together; a group may be smaller."""

READ_ONLY_BITS = (1,)
"""Affine bits that MLX runs but `convert` does not offer: too coarse for this model."""

MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
"""mlx-lm's recipes: low bits, and high bits for some value and down projections."""

RGEMMA = "rgemma"
RECIPES = (RGEMMA, *MIXED)

RGEMMA_BITS = (4, 5)
"""Low bits, and high bits for the `high_precision` modules of `griffin.parameters`."""

SCALE_DTYPES = {
    "affine": ("F32", "BF16", "F16"),
    "mxfp4": ("U8",),
    "nvfp4": ("U8",),
    "mxfp8": ("U8",),
}


@dataclass(frozen=True)
class Quantization:
    """Quantization of a matrix: groups of `group_size` weights share a scale."""

    group_size: int
    bits: int
    mode: str = "affine"

    @classmethod
    def choose(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> Quantization:
        """Return a quantization; arguments left out get the defaults of the mode.

        Raises:
            UserError: If a value is not supported; the message lists those that are.
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
        """Return the quantization of a matrix of `shape`, or None if its tensors fit none."""
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
        """Return whether MLX can quantize a matrix: the group size must divide its width."""
        return shape[-1] % max(self.group_size, PACKED_TOGETHER) == 0

    def packed(self, path: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """Return the tensors of a quantized matrix.

        Args:
            path: Name of its module.
            shape: Its shape before quantization.
            dtype: dtype of the scales and biases in affine mode.
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
        """Return the entry of `config.json`, which `nn.quantize` takes too."""
        return asdict(self)


def agrees(found: Quantization, written: Any) -> bool:
    """Return whether a layer's entry in `config.json` matches its tensors.

    Missing entries and keys match. mlx-lm's mixed recipes write null for the group size (and may
    for the bits): the default of the mode, as in `mx.quantize`.
    """
    if written is None:
        return True
    if not isinstance(written, Mapping):
        return bool(written)
    group_sizes, all_bits = MODES[found.mode]
    defaults = {"group_size": group_sizes[0], "bits": all_bits[0]}
    for key, value in found.as_dict().items():
        stated = written.get(key, value)
        if (defaults.get(key) if stated is None else stated) != value:
            return False
    return True


@dataclass(frozen=True)
class Recipe:
    """Quantization of all matrices of a model.

    Attributes:
        default: Mode, group size and, without a recipe, bits.
        name: One of `RECIPES`, or None if all matrices get the same bits.
    """

    default: Quantization
    name: str | None = None

    @classmethod
    def choose(
        cls,
        mode: str = "affine",
        bits: int | None = None,
        group_size: int | None = None,
        predicate: str | None = None,
    ) -> Recipe:
        """Return the recipe for a command's arguments.

        Args:
            mode, bits, group_size: As for `Quantization.choose`.
            predicate: Name of a recipe. Default: `rgemma` in affine mode without bits, else none.

        Raises:
            UserError: If a value is not supported; the message lists those that are.
        """
        how = Quantization.choose(mode, bits, group_size)
        if predicate is None:
            return cls(how, RGEMMA if mode == "affine" and bits is None else None)
        if predicate not in RECIPES:
            raise UserError(
                f"quant-predicate is {shown(predicate)}, expected one of {', '.join(RECIPES)}."
            )
        if mode != "affine":
            raise UserError(f"quant-predicate goes with q-mode affine, not with {mode}.")
        if bits is not None:
            raise UserError(f"the recipe {predicate} sets the bits; leave out q-bits.")
        return cls(how, predicate)

    def of(self, path: str, num_layers: int) -> Quantization:
        """Return the quantization of a matrix.

        Args:
            path: Path of its module, for example `model.layers.3.mlp_block.down_proj`.
            num_layers: Number of residual blocks of the model.
        """
        if self.name is None:
            return self.default
        if self.name == RGEMMA:
            bits = RGEMMA_BITS
            module = MODULES.get(path.rpartition(".")[2])
            high = module is not None and module.high_precision
        else:
            bits = MIXED[self.name]
            high = _mlx_lm_high_precision(path, num_layers)
        return replace(self.default, bits=bits[high])


def _mlx_lm_high_precision(path: str, num_layers: int) -> bool:
    """Return whether mlx-lm's mixed recipes give a matrix their high bits.

    They do in the first and last eighth of the layers and in every third layer between. They look
    for a separate LM head; a tied embedding gets the low bits.
    """
    parts = path.split(".")
    if parts[-1] not in ("v_proj", "down_proj"):
        return False
    layer, eighth = int(parts[2]), num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
