"""Which matrix of a model gets how many bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_rgemma.checkpoints.quantization import Quantization
from mlx_rgemma.errors import UserError, shown

MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
"""mlx-lm's recipes: low bits, and high bits for some of the value and down projections."""

RGEMMA = "rgemma"
RECIPES = (RGEMMA, *MIXED)

RGEMMA_BITS = (4, 5)
"""Low bits, and high bits for `HIGH_PRECISION_MODULES`; docs/quantization.md has the reasons."""

HIGH_PRECISION_MODULES = frozenset(
    ("embed_tokens", "linear_x", "linear_y", "linear_out", "q_proj", "k_proj", "v_proj")
)
"""The embedding, which is the head too, the recurrent projections, and what attention reads. Query
projections would do with less; with the bits of keys and values, the three run as one product."""


@dataclass(frozen=True)
class Recipe:
    """How the matrices of a model are to be quantized.

    Attributes:
        default: What holds for a matrix that the recipe does not single out.
        name: One of `RECIPES`, or None where all matrices are treated alike.
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
        """A recipe with the defaults for what is not given.

        Args:
            mode, bits, group_size: As for `Quantization.choose`.
            predicate: Name of a recipe. By default `rgemma`, if neither bits nor another mode are
                given, else none.

        Raises:
            UserError: Naming what is possible.
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
        """How a matrix is quantized.

        Args:
            path: Of its module, as in `model.layers.3.mlp_block.down_proj`.
            num_layers: Number of residual blocks of the model.
        """
        if self.name is None:
            return self.default
        if self.name == RGEMMA:
            low, high = RGEMMA_BITS
            raised = path.rpartition(".")[2] in HIGH_PRECISION_MODULES
        else:
            low, high = MIXED[self.name]
            raised = _mlx_lm_high_precision(path, num_layers)
        return replace(self.default, bits=high if raised else low)


def _mlx_lm_high_precision(path: str, num_layers: int) -> bool:
    """Whether mlx-lm's mixed recipes give a matrix their high bits.

    They do so in the first and last eighth of the layers and in each third one between. They look
    for a head of its own; an embedding that is the head too stays low.
    """
    parts = path.split(".")
    if parts[-1] not in ("v_proj", "down_proj"):
        return False
    layer, eighth = int(parts[2]), num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
