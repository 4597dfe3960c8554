"""Where tokens are generated: on a stream of their own, a Mac's memory held for the weights.

As mlx-lm does it (`generation_stream` and `wired_limit` of `mlx_lm.generate`), which takes a second
to import: as long as a small model needs to write two hundred tokens.
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
"""The stream of all loops here that generate."""


@contextmanager
def wired_limit(model: nn.Module, stream: Any) -> Iterator[None]:
    """Let a GPU's memory stay wired up to the recommended size while a model generates.

    Args:
        model: A warning on stderr says if it hardly fits.
        stream: What is to come to its end before the limit is what it was.
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
    """Let what is under way come to its end, in the loops here and in mlx-lm's.

    Before the processes that share a model go on: messages of two streams must not mix.
    """
    mx.synchronize()
    mx.synchronize(generation_stream)
    if (mlx_lm := sys.modules.get("mlx_lm.generate")) is not None:
        mx.synchronize(mlx_lm.generation_stream)
