"""Metal kernels that grad and vmap see through, and graphs of them that can be exported."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

ArrayFunction = Callable[..., Sequence[mx.array]]


class custom_function:
    """`mx.custom_function` that steps aside within `forward_only`.

    MLX cannot export a function with a gradient of its own ("Unable to get state for primitive
    CustomTransforms"), though the kernels in it can be exported.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.custom = mx.custom_function(function)
        self.vjp = self.custom.vjp
        self.vmap = self.custom.vmap

    def __call__(self, *arrays: mx.array) -> Any:
        return (self.function if _State.forward_only else self.custom)(*arrays)


@contextlib.contextmanager
def forward_only() -> Iterator[None]:
    """Within it the operations have no gradients, and `mx.export_function` takes them."""
    before, _State.forward_only = _State.forward_only, True
    try:
        yield
    finally:
        _State.forward_only = before


def is_forward_only() -> bool:
    """Whether the operations have no gradients at the moment."""
    return _State.forward_only


def run_fused(launch: ArrayFunction, plain: ArrayFunction, *arrays: mx.array) -> list[mx.array]:
    """``launch(*arrays)``, with the gradient and the vectorized form of ``plain(*arrays)``.

    A kernel only goes forward. Its gradient is computed from the plain operations, which are run
    again for that: nothing but the inputs is kept between the passes.

    Args:
        launch: What to run: floats and integers in, any number of arrays out.
        plain: The same in plain MLX operations.
        arrays: Inputs. Integer ones have a gradient of zero.
    """
    if _State.forward_only:
        return list(launch(*arrays))
    fused = custom_function(lambda *inputs: list(launch(*inputs)))

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

    return list(fused(*arrays))


class _Local(threading.local):
    forward_only = False


_State = _Local()
"""Of each thread: a server may generate in one while another trains."""
