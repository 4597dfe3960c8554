"""Peak memory of one step of LoRA over a quantized 2B model with random weights.

    python examples/finetune/step_memory.py --layers 3

The model has the shape of RecurrentGemma-2B, its vocabulary of 256,000 tokens, and 4 to 5 bits a
weight as `convert -q` gives them; `--layers 26` is all of it. One row is read, gone back through
with checkpointing, and Adam updates adapters on every linear layer, as `mlx_rgemma.lora
--grad-checkpoint --num-layers -1` does. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_rgemma import Model
from mlx_rgemma.adapters.files import AdapterConfig, add_adapters
from mlx_rgemma.evaluation.random_model import quantize, random_weights
from mlx_rgemma.griffin.config import PRESETS
from mlx_rgemma.ops.backend import Backend, active
from mlx_rgemma.tuner.data.packing import Batch
from mlx_rgemma.tuner.grad_checkpoint import checkpoint_layers
from mlx_rgemma.tuner.loss import batch_loss
from mlx_rgemma.tuner.memory_estimate import lora_step
from mlx_rgemma.tuner.train_state import TrainingState
from mlx_rgemma.tuner.trainer import Loop, LoopSettings

RANK = 8


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
    dtype = mx.float32 if active() is Backend.CPU else mx.bfloat16
    model = random_model(args.shape, args.layers, dtype)
    parameters: Any = tree_flatten(model.parameters())
    weights = sum(value.nbytes for _, value in parameters)
    counted = lora_step(model.args, args.tokens, weights, rank=RANK)

    add_adapters(model, AdapterConfig(num_layers=-1, rank=RANK))
    checkpoint_layers(model)
    ids = mx.random.randint(0, model.args.vocab_size, (1, args.tokens + 1), key=mx.random.key(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], mx.ones((1, args.tokens), mx.bool_))
    state = TrainingState(model, optim.Adam(learning_rate=1e-5))
    loop = Loop(state, {0: batch}, LoopSettings(iters=1), batch_loss, None, None)
    mx.eval(model.parameters(), batch.tokens, batch.targets, batch.mask)
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    loss, count = loop.step(0, update=True)
    peak = mx.get_peak_memory()

    print(f"{args.layers} layers, {args.tokens} tokens, {model.args.vocab_size} words")
    print(f"loss {loss / count:.3f}, {time.perf_counter() - started:.0f} s")
    for name, value in {**vars(counted), "peak": counted.peak}.items():
        print(f"counted {name}: {value / 1e9:.2f} GB")
    print(f"measured peak: {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
