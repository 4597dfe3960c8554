"""Models of known shapes with random weights, for measuring without a download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_rgemma.checkpoints.quantization import MODES, RECIPES, Recipe
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import PRESETS, GriffinConfig

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_rgemma.griffin.model import Model


def _small(vocab_size: int, hidden_size: int, layers: int, heads: int) -> GriffinConfig:
    return replace(
        PRESETS["2b"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        lru_width=hidden_size,
        intermediate_size=6 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=hidden_size // heads,
        dtype="float32",
    )


SHAPES = {"tiny": _small(512, 64, 3, 2), "small": _small(4096, 512, 12, 8), **PRESETS}
"""`small` has 39.7 million parameters; `2b` and `9b` are the released models."""

UNQUANTIZED = "none"


def recipe(label: str) -> Recipe | None:
    """The quantization that a label stands for: bits, a mode of MLX's, a recipe, or "none".

    Raises:
        UserError: If it stands for nothing.
    """
    if label == UNQUANTIZED:
        return None
    if label in RECIPES:
        return Recipe.choose(predicate=label)
    if label in MODES and label != "affine":
        return Recipe.choose(label)
    bits = MODES["affine"][1]
    if not label.isdecimal() or int(label) not in bits:
        known = [UNQUANTIZED, *map(str, sorted(bits)), *(m for m in MODES if m != "affine")]
        raise UserError(
            f"--quantize: found {label!r}, expected one of {', '.join([*known, *RECIPES])}."
        )
    return Recipe.choose(bits=int(label))


def quantize(model: Any, label: str) -> None:
    """Quantize a model in place, this package's or mlx-lm's: the names of their layers agree."""
    import mlx.nn as nn

    chosen = recipe(label)
    if chosen is None:
        return
    layers = len(model.layers)

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        how = chosen.of(path, layers)
        return how.as_dict() if how.fits(module.weight.shape) else False

    nn.quantize(model, class_predicate=settings)


def random_weights(config: GriffinConfig, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Weights of a model, by name; always the same. The recurrence forgets as in training."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_rgemma.griffin.model import Model
    from mlx_rgemma.tuner.init import initial_a_param

    parameters: Any = tree_flatten(Model(config).parameters())  # never computed
    for seed, (name, like) in enumerate(parameters):
        key, last = mx.random.key(seed), name.rpartition(".")[2]
        if last == "recurrent_param":
            value = initial_a_param(like.shape, key).astype(dtype)
        elif last in ("bias", "input_gate_bias", "recurrent_gate_bias") or like.ndim == 1:
            value = mx.random.uniform(-0.03, 0.03, like.shape, dtype, key=key)
        else:
            inputs = like.shape[-2] if last.endswith("gate_weight") else like[0].size
            bound = (3 / inputs) ** 0.5  # variance 1 / inputs; normal numbers would take longer
            value = mx.random.uniform(-bound, bound, like.shape, dtype, key=key)
        yield name, value


def random_model(config: GriffinConfig, dtype: mx.Dtype, label: str = UNQUANTIZED) -> Model:
    """A model with random weights, quantized matrix by matrix as it is made."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_rgemma.griffin.model import Model

    model = Model(replace(config, dtype=str(dtype).removeprefix("mlx.core.")))
    model.load_weights(list(random_weights(config, dtype)))
    quantize(model, label)
    model.eval()
    parameters: Any = tree_flatten(model.parameters())
    for _, value in parameters:
        mx.eval(value)  # one at a time: what it was made from is let go of
    model.prepare_for_inference()
    return model
