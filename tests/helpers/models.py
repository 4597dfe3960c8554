"""The golden models, and arrays that Google's code computed with them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("tiny-2b", "tiny-9b", "tiny-sharded")


def golden(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of one golden file."""
    with np.load(GOLDEN / name) as arrays:
        return {key: arrays[key] for key in arrays.files}


@cache
def golden_weights(name: str) -> dict[str, mx.array]:
    """Return a golden checkpoint's tensors as they are on disk."""
    weights: dict[str, mx.array] = {}
    for file in sorted((GOLDEN / name).glob("*.safetensors")):
        weights.update(mx.load(str(file)))
    return weights


def golden_model(
    name: str, dtype: mx.Dtype = mx.float32, *, fuse: bool = True, **changes: Any
) -> Any:
    """Return a golden checkpoint as a model, prepared as by `load`.

    Args:
        name: One of `MODELS`.
        dtype: Of the weights.
        fuse: Whether to fuse projections.
        changes: Keys of its configuration that differ.
    """
    from mlx_rgemma import GriffinConfig, Model

    values = json.loads((GOLDEN / name / "config.json").read_text())
    model = Model(GriffinConfig.from_dict({**values, **changes}))
    weights = model.sanitize(golden_weights(name))
    kept = [(k, v.astype(dtype)) for k, v in weights.items() if _belongs(model, k)]
    model.load_weights(kept)
    mx.eval(model.parameters())
    if fuse:
        model.prepare_for_inference(dequantize=False)
    return model


def _belongs(model: Any, name: str) -> bool:
    """Return whether a tensor belongs to a model that may have fewer layers."""
    parts = name.split(".")
    return parts[1] != "layers" or int(parts[2]) < len(model.layers)
