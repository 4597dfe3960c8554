"""Count the launches of a model on a Mac's GPU in its recorded graph; no GPU is needed.

A launch is a primitive that is not a view. As on a Mac, one `mx.fast` operation, one group of
elementwise operations behind `mx.compile` and one custom kernel are a launch each: MLX's graph on a
CPU takes the first two apart, so while a graph is recorded a single marker stands for each.
A view that has to copy its input (a reshape of a transposed array, a strided input of a custom
kernel) is counted as a copy, beside the launches.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops import activations, backend, metal
from mlx_rgemma.ops.autograd import inference_mode

VIEWS = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Copy",
    "Depends",
    "ExpandDims",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
}
WINDOW = 512
"""Window of the models that are counted: longer than the chunks."""

RESHAPES = {"Reshape", "Flatten", "Unflatten"}


@dataclass
class Launches:
    """Launches of one call.

    Attributes:
        kinds: Launches by primitive, custom kernels by their name.
        copies: Views that copy, by primitive.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    @property
    def copied(self) -> int:
        return sum(self.copies.values())


def count_launches(function: Callable[..., Any], *arrays: mx.array) -> Launches:
    """Record a function of arrays and count its launches.

    Args:
        function: Returns arrays; everything computed for them is counted.
        *arrays: Only their shapes and dtypes matter.
    """
    nodes: list[dict[str, Any]] = []

    def record(node: dict[str, Any]) -> None:
        if node["type"] == "primitive":
            nodes.append(node)

    with _markers(), inference_mode():
        mx.export_function(record, function, *arrays)
    launches, layout = Launches(), _Layout()
    for node in nodes:
        name = node["name"]
        if name in RESHAPES:
            if not layout.is_contiguous(node["inputs"][0]):
                launches.copies[name] += 1
        elif name not in VIEWS:
            if name == "CustomKernel":
                name = str(node["arguments"][0]).split("__")[0]
                name = name.removeprefix("custom_kernel_").removeprefix("mlx_rgemma_")
                strided = [a for a in node["inputs"] if not layout.is_contiguous(a)]
                launches.copies["input of a kernel"] += len(strided)
            launches.kinds[name] += 1
        layout.follow(node)
    return launches


def count_model(config: GriffinConfig, length: int, *, theirs: bool = False) -> Launches:
    """Count the launches of one call of a bfloat16 model in the middle of a text.

    Args:
        config: The shape. Launches depend on its layers, not on its widths.
        length: Tokens of the call: 1 for a decode step, more for a chunk of a prompt.
        theirs: Count mlx-lm's own model instead.
    """
    model: Any = _their_model(config) if theirs else Model(config)
    model.set_dtype(mx.bfloat16)
    model.eval()
    mx.eval(model.parameters())
    if not theirs:
        model.fuse_projections()
    cache = model.make_cache()
    model(mx.zeros((1, 2 * config.attention_window_size), mx.int32), cache=cache)
    mx.eval([layer.state for layer in cache])

    def call(tokens: mx.array) -> list[mx.array]:
        state = copy.deepcopy(cache)
        logits = model(tokens, cache=state)
        return [logits, *_arrays([layer.state for layer in state])]

    with backend.use(backend.Backend.METAL), metal.skip_validation():
        return count_launches(call, mx.zeros((1, length), mx.int32))


def count_layer(kind: str, length: int) -> int:
    """Return the launches of one layer, "recurrent" or "attention"."""
    one, two = (count_model(small_model(n, (kind,)), length).total for n in (1, 2))
    return two - one


def small_model(layers: int, block_types: tuple[str, ...]) -> GriffinConfig:
    """Return the shape of a model that is large enough for counting."""
    return GriffinConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        head_dim=32,
        lru_width=64,
        attention_window_size=WINDOW,
        block_types=block_types,
    )


def _their_model(config: GriffinConfig) -> nn.Module:
    import importlib.util
    import sys

    # By its file: `register` may have put this package's class in its place.
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None and spec.submodule_search_locations is not None
    path = os.path.join(spec.submodule_search_locations[0], "models", "recurrent_gemma.py")
    found = importlib.util.spec_from_file_location("mlx_lm.models._recurrent_gemma", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    model = module.Model(module.ModelArgs.from_dict(config.to_dict()))
    model.pop("lm_head")
    return model


def _arrays(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    return [a for part in tree for a in _arrays(part)] if isinstance(tree, list | tuple) else []


def _marker(name: str, function: Any) -> Callable[..., mx.array]:
    """Return a function that records one custom kernel in place of another function."""

    def marker(*args: Any, **kwargs: Any) -> mx.array:
        result = function(*args, **kwargs)
        arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
        kernel: Any = mx.fast.metal_kernel(
            name=f"{name}_",  # MLX appends the types behind another underscore
            input_names=[f"x{i}" for i in range(len(arrays))],
            output_names=["y"],
            source="",
            ensure_row_contiguous=False,
        )
        return kernel(
            inputs=arrays,
            output_shapes=[result.shape],
            output_dtypes=[result.dtype],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )[0]

    return marker


@contextlib.contextmanager
def _markers() -> Iterator[None]:
    """Replace MLX's fast operations and compiled activations, and ours, by markers."""
    with contextlib.ExitStack() as stack:
        for name in ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention"):
            function = _marker(name, getattr(mx.fast, name))
            stack.enter_context(mock.patch.object(mx.fast, name, function))
        for name in ("gelu_approx", "gelu", "silu", "softplus"):
            function = _marker(name, getattr(nn, name))
            stack.enter_context(mock.patch.object(nn, name, function))
        contiguous = _marker("contiguous", mx.contiguous)  # MLX cannot export the primitive
        stack.enter_context(mock.patch.object(mx, "contiguous", contiguous))
        for operation in (activations.gated_gelu, activations.residual_add, activations.soft_cap):
            name = operation.reference.__name__
            compiled = _marker(name, operation.reference)
            stack.enter_context(operation.replaced(backend.Backend.METAL, compiled))
        yield


class _Layout:
    """The arrays of a recorded graph that are contiguous in row-major order."""

    def __init__(self) -> None:
        self.strided: dict[str, np.ndarray] = {}

    def is_contiguous(self, array: tuple[str, Any, Any]) -> bool:
        shadow = self.strided.get(array[0])
        return shadow is None or bool(shadow.flags.c_contiguous)

    def follow(self, node: dict[str, Any]) -> None:
        """Record the layout of a node's outputs. Shadows have shape and strides, but no data."""
        name, arguments = node["name"], node["arguments"]
        if name not in VIEWS or not node["inputs"]:
            return
        shadow = self._shadow(node["inputs"][0])
        if name == "Transpose":
            self._keep(node, [shadow.transpose(arguments[0])])
        elif name == "Slice":
            start, stop, step = arguments
            self._keep(node, [shadow[tuple(map(slice, start, stop, step))]])
        elif name == "Split":
            self._keep(node, np.split(shadow, arguments[0], axis=arguments[1]))
        elif name in ("Broadcast", "BroadcastAxes"):
            self._keep(node, [np.broadcast_to(shadow, node["outputs"][0][1])])
        elif name == "ExpandDims":
            self._keep(node, [np.expand_dims(shadow, tuple(arguments[0]))])
        elif name == "Squeeze":
            self._keep(node, [np.squeeze(shadow, tuple(arguments[0]))])
        else:
            self._keep(node, [shadow])

    def _shadow(self, array: tuple[str, Any, Any]) -> np.ndarray:
        name, shape, _ = array
        found = self.strided.get(name)
        if found is not None:
            return found
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        return np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, strides)

    def _keep(self, node: dict[str, Any], shadows: list[np.ndarray]) -> None:
        for output, shadow in zip(node["outputs"], shadows, strict=True):
            self.strided[output[0]] = shadow
