"""How the weights of a new model begin (Griffin, arXiv:2402.19427, section 2.4).

Matrices are normal with variance 1 / inputs, as LeCun's; the last projection of each branch into
the residual stream has 2 / layers of that, as in DeepMind's code, so that the stream does not grow
with the depth. Norms compute ``1 + weight`` and begin at 0, as do biases. Lambda is drawn so that
``a^c``, with ``a = exp(-softplus(Lambda))`` and c = 8, is uniform between 0.9 and 0.999: with an
open recurrence gate, memories of ten to a thousand tokens. (The released code leaves the power c
out, which makes them eight times shorter.)
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.rg_lru import C

LOWEST, HIGHEST = 0.9, 0.999
"""Between them a^c begins."""


def initialize(model: Model, seed: int) -> None:
    """Give a model the weights that training begins with, in the dtypes that it has.

    Args:
        model: Any Griffin model.
        seed: The weights follow from it, and from the order of the parameters, alone.
    """
    key = mx.random.key(seed)
    last_scale = 2.0 / len(model.layers)
    weights = []
    parameters: Any = tree_flatten(model.parameters())
    for name, old in parameters:
        key, own = mx.random.split(key)
        weights.append((name, _initial(name, old.shape, last_scale, own).astype(old.dtype)))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())


def _initial(name: str, shape: tuple[int, ...], last_scale: float, key: mx.array) -> mx.array:
    kind = name.rsplit(".", 1)[-1]
    if kind == "recurrent_param":
        return initial_a_param(shape, key)
    if kind == "bias" or kind.endswith("_bias") or "norm" in name:
        return mx.zeros(shape)
    # (heads, inputs, outputs), (channels, taps, 1) or (outputs, inputs).
    variance = 1.0 / shape[1]
    if any(last in name for last in ("linear_out", "o_proj", "down_proj")):
        variance *= last_scale
    return mx.random.normal(shape, key=key) * math.sqrt(variance)


def initial_a_param(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """Lambda such that a^c is uniform between `LOWEST` and `HIGHEST`, fp32."""
    power = mx.random.uniform(LOWEST, HIGHEST, shape, key=key)
    # a^c = exp(-c softplus(Lambda)), and softplus(z) = log(1 + exp(z)).
    return mx.log(mx.expm1(-mx.log(power) / C))
