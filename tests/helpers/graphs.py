"""The primitives of a function's graph, recorded with its Metal kernels on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops import backend, inference_mode, metal
from mlx_rgemma.ops.backend import Backend

VIEWS = {
    "Broadcast",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unflatten",
}


def primitives(function: Callable[..., Any], *arrays: mx.array, views: bool = False) -> list[str]:
    """Return the names of the primitives, in order; `mx.export_function` needs no Metal for that.

    Args:
        function: Run on the METAL backend in `inference_mode`.
        arrays: Its arguments.
        views: Include primitives that launch nothing.
    """
    names: list[str] = []

    def note(event: dict[str, Any]) -> None:
        if event["type"] == "primitive" and (views or event["name"] not in VIEWS):
            names.append(event["name"])

    with backend.use(Backend.METAL), metal.skip_validation(), inference_mode():
        mx.export_function(note, function, *arrays)
    return names
