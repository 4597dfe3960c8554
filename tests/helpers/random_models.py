"""A small model with random weights, of a shape that processes can share and that can be quantized.

Both recurrence and attention, a bias wherever the configuration allows one, and four heads of 32
channels: quantized in groups of 32, as the mx modes are, it can be cut into four.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import mlx_rgemma
from mlx_rgemma import GriffinConfig, Model

EMBEDDED = Path(mlx_rgemma.__file__).parent / "assets" / "embedded"

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "lru_width": 128,
    "attention_window_size": 16,
    "attention_bias": True,
}
CONFIG = GriffinConfig(vocab_size=96, **SHAPE)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 16,
    "lru_width": 32,
}
"""Where one process is enough: no vocabulary and no window yet."""

TOKENS = mx.array(
    [[2, 5, 9, 17, 33, 4, 60, 7, 8, 91, 12, 13], [2, 6, 1, 44, 3, 3, 9, 70, 2, 5, 8, 1]]
)


def random_model(quantized: dict[str, Any] | None = None, config: GriffinConfig = CONFIG) -> Model:
    """The same weights each time, quantized with the arguments of `nn.quantize`."""
    mx.random.seed(3)
    model = Model(config)
    weights = [
        (name, 0.2 * mx.random.normal(value.shape) + 0.1 * ("bias" in name))
        for name, value in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    if quantized is not None:
        nn.quantize(model, class_predicate=model.quant_predicate, **quantized)
    model.eval()
    mx.eval(model.parameters())
    return model


def random_checkpoint(folder: Path) -> Path:
    """Such a model in a folder, with the embedded model's tokenizer and the vocabulary it needs."""
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("model*", "*.md"))
    values = {**json.loads((EMBEDDED / "config.json").read_text()), **SHAPE}
    (folder / "config.json").write_text(json.dumps(values))
    model = random_model(config=GriffinConfig.from_dict(values))
    model.save_weights(str(folder / "model.safetensors"))
    return folder


def read(model: Model, chunks: tuple[int, ...]) -> np.ndarray:
    """Logits of `TOKENS`, fed in chunks."""
    cache, outputs, at = model.make_cache(TOKENS.shape[0]), [], 0
    for size in chunks:
        outputs.append(np.array(model(TOKENS[:, at : at + size], cache=cache)))
        at += size
    return np.concatenate(outputs, axis=1)


def write(model: Model, length: int) -> tuple[list[list[int]], np.ndarray]:
    """The greedy continuation of `TOKENS`, and the logits that chose it: (B, length, vocab)."""
    cache, tokens, outputs = model.make_cache(TOKENS.shape[0]), TOKENS, []
    for _ in range(length):
        outputs.append(np.array(model(tokens, cache=cache)[:, -1]))
        tokens = mx.array(outputs[-1].argmax(axis=-1))[:, None]
    logits = np.stack(outputs, axis=1)
    return logits.argmax(axis=-1).tolist(), logits
