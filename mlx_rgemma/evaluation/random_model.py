"""Models with random weights, for measuring without a download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_rgemma.checkpoints.quantization import MODES, RECIPES, Recipe
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation.timing import UNQUANTIZED
from mlx_rgemma.griffin.config import SHAPES as SHAPES
from mlx_rgemma.griffin.config import GriffinConfig

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_rgemma.griffin.model import Model


def recipe(label: str) -> Recipe | None:
    """Return the recipe of a label: bits, one of MLX's modes, a recipe, or "none".

    Raises:
        UserError: If the label is none of these.
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
    """Quantize a model in place, this package's or mlx-lm's, whose layers have the same names."""
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
    """Yield a model's weights by name, always the same, with Lambda as training begins with it."""
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
            bound = (3 / inputs) ** 0.5  # variance 1 / inputs; normal values would take longer
            value = mx.random.uniform(-bound, bound, like.shape, dtype, key=key)
        yield name, value


def random_model(config: GriffinConfig, dtype: mx.Dtype, label: str = UNQUANTIZED) -> Model:
    """Return a model with random weights, quantized one matrix at a time."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_rgemma.griffin.model import Model

    model = Model(replace(config, dtype=str(dtype).removeprefix("mlx.core.")))
    model.load_weights(list(random_weights(config, dtype)))
    quantize(model, label)
    model.eval()
    parameters: Any = tree_flatten(model.parameters())
    for _, value in parameters:
        mx.eval(value)  # one at a time, to free what it was made from
    model.prepare_for_inference()
    return model
