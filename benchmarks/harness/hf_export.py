"""Checkpoints that every engine can read: Hugging Face's names and layouts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.evaluation.random_model import random_weights
from mlx_rgemma.griffin.config import GriffinConfig

if TYPE_CHECKING:
    import mlx.core as mx

CONVOLUTION = "conv_1d.weight"


def write_random(folder: Path, config: GriffinConfig, dtype: str) -> None:
    """Write a model with random weights of a dtype."""
    import mlx.core as mx

    weights = random_weights(config, getattr(mx, dtype))
    _write(folder, replace(config, dtype=dtype), weights)


def in_mlx_layout(folder: Path) -> bool:
    """Return whether convolutions have MLX's layout, which transformers refuses."""
    tensors = CheckpointFolder.open(folder).tensors
    shapes = [info.shape for name, info in tensors.items() if name.endswith(CONVOLUTION)]
    return any(shape[-1] == 1 for shape in shapes)


def write_copy(folder: Path, source: Path) -> None:
    """Write the weights of an unquantized checkpoint in Hugging Face's layout."""
    from mlx.utils import tree_flatten

    from mlx_rgemma.checkpoints.load import load_model

    model, config = load_model(source, dtype=CheckpointFolder.open(source).config.dtype, lazy=True)
    parameters: Any = tree_flatten(model.parameters())
    _write(folder, config, parameters)


def _write(folder: Path, config: GriffinConfig, weights: Iterable[tuple[str, mx.array]]) -> None:
    """Write weights that are in MLX's layout."""
    import mlx.core as mx

    tensors = {
        name: value.swapaxes(1, 2) if name.endswith(CONVOLUTION) else value
        for name, value in weights
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
