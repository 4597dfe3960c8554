"""The stream of generation, and a Mac's wired memory for the weights.

The same as `generation_stream` and `wired_limit` of `mlx_lm.generate`, which takes a second to
import: as long as a small model takes for two hundred tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

generation_stream: Any = mx.new_thread_local_stream(mx.default_device())
"""The stream of all decode loops of this package, one per thread."""


@contextmanager
def wired_limit(model: nn.Module, stream: Any) -> Iterator[None]:
    """Keep a GPU's memory wired, up to the recommended size, while a model generates.

    Args:
        model: The model; a warning on stderr is printed if it hardly fits.
        stream: Synchronized before the limit is restored.
    """
    recommended: Any = mx.device_info().get("max_recommended_working_set_size")
    if recommended is None:  # a CPU
        yield
        return
    leaves: Any = tree_flatten(model.parameters())
    size = sum(value.nbytes for _, value in leaves)
    if size > 0.9 * recommended:
        print(
            f"warning: the model takes {size / 1e9:.1f} GB of the {recommended / 1e9:.1f} GB that"
            " the GPU should use, which can be slow; quantize it (mlx_rgemma.convert -q).",
            file=sys.stderr,
        )
    before = mx.set_wired_limit(recommended)
    try:
        yield
    finally:
        mx.synchronize(stream)
        mx.set_wired_limit(before)


def synchronize_streams() -> None:
    """Synchronize the default stream and the generation streams of this package and mlx-lm.

    Needed before ranks communicate: messages of two streams must not interleave.
    """
    mx.synchronize()
    mx.synchronize(generation_stream)
    if (mlx_lm := sys.modules.get("mlx_lm.generate")) is not None:
        mx.synchronize(mlx_lm.generation_stream)
