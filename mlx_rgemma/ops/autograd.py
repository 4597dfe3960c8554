"""Gradients of custom kernels, and a mode without gradients.

MLX differentiates no custom kernel, and exports no function with a custom gradient ("Unable to get
state for primitive CustomTransforms"). `custom_function` is MLX's outside of `inference_mode`, and
the bare function within it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx


class custom_function:
    """`mx.custom_function` that is the bare function within `inference_mode`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.custom = mx.custom_function(function)
        self.vjp = self.custom.vjp
        self.vmap = self.custom.vmap

    def __call__(self, *arrays: mx.array) -> Any:
        return (self.function if is_inference() else self.custom)(*arrays)


@contextlib.contextmanager
def inference_mode() -> Iterator[None]:
    """Run operations without gradients, in this thread; `mx.export_function` needs it."""
    before, _local.inference = _local.inference, True
    try:
        yield
    finally:
        _local.inference = before


def is_inference() -> bool:
    """Return whether this thread is in `inference_mode`."""
    return _local.inference


def with_reference_gradient(
    function: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Give a function the gradient and the vectorized form of its reference.

    The reference is run again for the gradient: nothing but the inputs is kept between the passes.

    Args:
        function: ``(*arrays, **options) -> array or tuple of arrays``. An array may be None.
            Integer arrays have a gradient of zero.
        reference: The same in operations that MLX differentiates.
    """

    def run(*arrays: mx.array | None, **options: Any) -> Any:
        if is_inference():
            return function(*arrays, **options)
        given = [i for i, x in enumerate(arrays) if x is not None]

        def call(f: Callable[..., Any], values: Any) -> Any:
            full: list[Any] = [None] * len(arrays)
            for place, value in zip(given, values, strict=True):
                full[place] = value
            return f(*full, **options)

        custom = mx.custom_function(lambda *values: call(function, values))

        @custom.vjp
        def gradient(primals: Any, cotangents: Any, _outputs: Any) -> Any:
            primals, cotangents = _as_list(primals), _as_list(cotangents)
            floats = [i for i, x in enumerate(primals) if mx.issubdtype(x.dtype, mx.floating)]

            def of_floats(*values: mx.array) -> list[mx.array]:
                inputs = list(primals)
                for place, value in zip(floats, values, strict=True):
                    inputs[place] = value
                return _as_list(call(reference, inputs))

            _, gradients = mx.vjp(of_floats, [primals[i] for i in floats], cotangents)
            result = [mx.zeros_like(x) for x in primals]
            for place, value in zip(floats, gradients, strict=True):
                result[place] = value
            return tuple(result)

        @custom.vmap
        def vectorized(primals: Any, axes: Any) -> Any:
            primals, axes = _as_list(primals), _as_list(axes)
            outputs = mx.vmap(lambda *x: call(reference, x), in_axes=tuple(axes))(*primals)
            # MLX wants the axes in a container of the outputs' type.
            several = isinstance(outputs, tuple | list)
            return outputs, type(outputs)([0] * len(outputs)) if several else 0

        return custom(*[arrays[i] for i in given])

    return run


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


class _Local(threading.local):
    inference = False


_local = _Local()
"""Of each thread: a server may generate in one while another trains."""
