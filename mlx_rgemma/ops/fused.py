"""A Metal kernel that grad and vmap see through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

ArrayFunction = Callable[..., Sequence[mx.array]]


def run_fused(launch: ArrayFunction, plain: ArrayFunction, *arrays: mx.array) -> list[mx.array]:
    """``launch(*arrays)``, with the gradient and the vectorized form of ``plain(*arrays)``.

    A kernel only goes forward. Its gradient is computed from the plain operations, which are run
    again for that: nothing but the inputs is kept between the passes.

    Args:
        launch: What to run: floats and integers in, any number of arrays out.
        plain: The same in plain MLX operations.
        arrays: Inputs. Integer ones have a gradient of zero.
    """
    fused = mx.custom_function(lambda *inputs: list(launch(*inputs)))

    @fused.vjp
    def gradient(primals, cotangents, _outputs):
        places = [i for i, x in enumerate(primals) if mx.issubdtype(x.dtype, mx.floating)]

        def of_floats(*floats: mx.array) -> list[mx.array]:
            inputs = list(primals)
            for place, value in zip(places, floats, strict=True):
                inputs[place] = value
            return list(plain(*inputs))

        _, gradients = mx.vjp(of_floats, [primals[i] for i in places], list(cotangents))
        result = [mx.zeros_like(x) for x in primals]
        for place, value in zip(places, gradients, strict=True):
            result[place] = value
        return result

    @fused.vmap
    def vectorized(primals, axes):
        outputs = mx.vmap(lambda *x: tuple(plain(*x)), in_axes=tuple(axes))(*primals)
        return list(outputs), [0] * len(outputs)

    outputs: Any = fused(*arrays)
    return list(outputs)
