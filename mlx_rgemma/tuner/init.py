"""Initial weights of a new model (Griffin, arXiv:2402.19427, section 2.4).

Matrices are normal with variance 1 / inputs (LeCun); the output projections into the residual
stream have 2 / layers of that, as in DeepMind's code, so that the stream does not grow with the
depth. Norms compute ``1 + weight`` and begin at 0, as do biases. Lambda is drawn so that ``a^c``,
with ``a = exp(-softplus(Lambda))`` and c = 8, is uniform between 0.9 and 0.999: with an open
recurrence gate, memories of 10 to 1,000 tokens. (The released code omits the power c, which makes
them eight times shorter.)
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rgemma.griffin.model import Model
from mlx_rgemma.griffin.parameters import A_PARAM, Role, find_module, is_bias
from mlx_rgemma.ops.rg_lru import C

MIN_DECAY, MAX_DECAY = 0.9, 0.999
"""Range of a^c."""


def initialize(model: Model, seed: int) -> None:
    """Set the initial weights of a model, in its dtypes.

    Args:
        model: The model.
        seed: Seed of the weights, which also depend on the order of the parameters.
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
    if name.endswith(A_PARAM):
        return initial_a_param(shape, key)
    role = find_module(name).role
    if is_bias(name) or role is Role.NORM:
        return mx.zeros(shape)
    # (heads, inputs, outputs), (channels, taps, 1) or (outputs, inputs).
    variance = 1.0 / shape[1]
    if role is Role.OUT_PROJ:
        variance *= last_scale
    return mx.random.normal(shape, key=key) * math.sqrt(variance)


def initial_a_param(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """Return Lambda such that a^c is uniform between `MIN_DECAY` and `MAX_DECAY`, fp32."""
    power = mx.random.uniform(MIN_DECAY, MAX_DECAY, shape, key=key)
    # a^c = exp(-c softplus(Lambda)), and softplus(z) = log(1 + exp(z)).
    return mx.log(mx.expm1(-mx.log(power) / C))
