"""Operations that are computed at once in training, and keep nothing but their results.

Products by NumPy evaluate their inputs while MLX traces the loss. Whatever was computed on the way
there stays in memory until the gradients are known, as part of the traced graph: thirty arrays for
a GELU. So the operations between the products are computed on copies that the graph does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops.autograd import is_inference

Arrays = Sequence[mx.array]


def eager(
    gradient: Callable[[Arrays, Arrays, Arrays], Arrays] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compute a function at once on copies of its arguments, and its gradient likewise.

    Args:
        gradient: ``(primals, cotangents, outputs) -> gradients``; by default that of the function,
            which is run again for it.

    The function takes arrays (or None) and keywords, and returns an array or a tuple of arrays.
    Where arrays have no values (within `mx.compile` and `mx.vmap`) it runs as it is.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*arrays: mx.array | None, **options: Any) -> Any:
            if is_inference():
                return function(*arrays, **options)
            given = [i for i, x in enumerate(arrays) if x is not None]

            def call(*values: mx.array) -> Any:
                full: list[Any] = [None] * len(arrays)
                for place, value in zip(given, values, strict=True):
                    full[place] = value
                return function(*full, **options)

            custom = mx.custom_function(lambda *values: _at_once(call, values))

            @custom.vjp
            def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
                parts = [_as_list(z) for z in (primals, cotangents, outputs)]

                def gradients(*values: mx.array) -> Any:
                    first, second = len(parts[0]), len(parts[0]) + len(parts[1])
                    p, c, o = values[:first], values[first:second], values[second:]
                    found = _gradient_of(call, p, c) if gradient is None else gradient(p, c, o)
                    return tuple(found)

                return _at_once(gradients, [x for part in parts for x in part])

            return custom(*[arrays[i] for i in given])

        return run

    return decorate


def _at_once(function: Callable[..., Any], arrays: Sequence[mx.array]) -> Any:
    try:
        mx.eval(*arrays)
    except ValueError:  # no values: a function is being traced
        return function(*arrays)
    results = function(*[_copy(x) for x in arrays])
    mx.eval(results)
    return results


def detach(*arrays: mx.array) -> tuple[mx.array, ...]:
    """Evaluate arrays and return copies that are no part of a traced graph.

    Arrays without values (within `mx.compile` and `mx.vmap`) are returned as they are.
    """
    try:
        mx.eval(*arrays)
    except ValueError:
        return arrays
    return tuple(_copy(x) for x in arrays)


def _copy(x: mx.array) -> mx.array:
    """Return an array that is no part of a traced graph."""
    if x.dtype == mx.bfloat16:
        return mx.array(np.asarray(x.view(mx.uint16))).view(mx.bfloat16)
    return mx.array(np.asarray(x))


def _gradient_of(call: Callable[..., Any], primals: Arrays, cotangents: Arrays) -> list[mx.array]:
    floats = [i for i, x in enumerate(primals) if mx.issubdtype(x.dtype, mx.floating)]

    def of_floats(*values: mx.array) -> list[mx.array]:
        inputs = list(primals)
        for place, value in zip(floats, values, strict=True):
            inputs[place] = value
        return _as_list(call(*inputs))

    _, found = mx.vjp(of_floats, [primals[i] for i in floats], list(cotangents))
    result = [mx.zeros_like(x) for x in primals]
    for place, value in zip(floats, found, strict=True):
        result[place] = value
    return result


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]
