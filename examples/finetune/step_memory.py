"""Peak memory of one step of LoRA over a quantized 2B model with random weights.

    python examples/finetune/step_memory.py --layers 3

The model has the shape of RecurrentGemma-2B, its vocabulary of 256,000 words too, and 4 to 5 bits a
weight as `convert -q` gives them; `--layers 26` is all of it. One row is read, gone back through
with checkpointing, and Adam updates adapters on every linear layer, as `mlx_rgemma.lora
--grad-checkpoint --num-layers -1` does. Nothing is downloaded.

A Mac multiplies with quantized weights as they are. On a Linux CPU that takes hours here, and
expanding the whole head first would take gigabytes that no Mac needs: this script expands a few
rows at a time, going forward and backward, so that what is measured is the step's own.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_rgemma import Model
from mlx_rgemma.checkpoints.adapters import AdapterConfig, add_adapters
from mlx_rgemma.griffin.config import PRESETS
from mlx_rgemma.measurement.shapes import quantize, random_weights
from mlx_rgemma.ops import on_linux_cpu, quantized_linear
from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.tuner.batch import Batch
from mlx_rgemma.tuner.checkpoint import TrainingState
from mlx_rgemma.tuner.checkpointing import checkpoint_layers
from mlx_rgemma.tuner.loop import Loop, LoopSettings
from mlx_rgemma.tuner.loss import batch_loss
from mlx_rgemma.tuner.memory import lora_step

RANK = 8

EXPANDED = 1 << 20
"""Weights that are expanded at once. MLX runs up to 100 operations ahead of what it frees."""


def in_blocks(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, **how: Any
) -> mx.array:
    """`mlx_rgemma.ops.quantized_linear`, a block of rows of the matrix after another."""
    inputs = x.shape[-1]
    size = max(EXPANDED // inputs, 1)
    if not on_linux_cpu() or weight.shape[0] <= size:
        return quantized_linear(x, weight, scales, biases, **how)
    starts = range(0, weight.shape[0], size)

    def expanded(start: int, done: list[mx.array]) -> mx.array:
        rows = [part[start : start + size] for part in (weight, scales, biases)]
        return mx.dequantize(*(mx.depends(rows, done) if done else rows), **how).astype(mx.float32)

    @custom_function
    def product(x: mx.array) -> mx.array:
        found: list[mx.array] = []
        for start in starts:
            found.append(x @ expanded(start, found[-1:]).T)
        return mx.concatenate(found, axis=-1)

    @product.vjp
    def gradient(x, cotangent, _):
        total = mx.zeros((cotangent.shape[0], inputs), mx.float32)
        for start in starts:
            total = total + cotangent[:, start : start + size] @ expanded(start, [total])
        return total

    rows = x.astype(mx.float32).reshape(-1, inputs)
    return product(rows).reshape(*x.shape[:-1], weight.shape[0]).astype(x.dtype)


def random_model(shape: str, layers: int, dtype: mx.Dtype) -> Model:
    """Quantized matrix by matrix: no more than one is ever plain."""
    config = replace(PRESETS[shape], num_hidden_layers=layers)
    model = Model(config)
    model.load_weights(list(random_weights(config, dtype)))
    quantize(model, "rgemma")
    parameters: Any = tree_flatten(model.parameters())
    for _, value in parameters:
        mx.eval(value)
    model.fuse_projections()
    return model


def main() -> None:
    """Measure, and compare with the count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=("2b", "9b"), default="2b")
    parser.add_argument("--layers", type=int, default=3, help="Default: two recurrent, one other.")
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    dtype = mx.float32 if on_linux_cpu() else mx.bfloat16
    model = random_model(args.shape, args.layers, dtype)
    parameters: Any = tree_flatten(model.parameters())
    weights = sum(value.nbytes for _, value in parameters)
    counted = lora_step(model.args, args.tokens, weights, rank=RANK)

    add_adapters(model, AdapterConfig(num_layers=-1, rank=RANK))
    checkpoint_layers(model)
    ids = mx.random.randint(0, model.args.vocab_size, (1, args.tokens + 1), key=mx.random.key(0))
    everything = mx.ones((1, args.tokens), mx.bool_)
    batch = Batch(ids[:, :-1], ids[:, 1:], everything, mx.arange(args.tokens)[None])
    state = TrainingState(model, optim.Adam(learning_rate=1e-5))
    loop = Loop(state, {0: batch}, LoopSettings(iters=1), batch_loss, None, None)
    mx.eval(model.parameters(), vars(batch))
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    with mock.patch("mlx_rgemma.griffin.linear.quantized_linear", in_blocks):
        loss, count = loop.step(0, update=True)
    peak = mx.get_peak_memory()

    print(f"{args.layers} layers, {args.tokens} tokens, {model.args.vocab_size} words")
    print(f"loss {loss / count:.3f}, {time.perf_counter() - started:.0f} s")
    for name, value in {**vars(counted), "peak": counted.peak}.items():
        print(f"counted {name}: {value / 1e9:.2f} GB")
    print(f"measured peak: {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
