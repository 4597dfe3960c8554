"""Training tokens per second and peak memory beside mlx-lm and transformers.

    python examples/finetune/compare_training.py --tokens 128 512 2048

Every engine trains the same random Griffin in float32, in a process of its own, on the same rows of
tokens, with the loss of all of them: LoRA of rank 8 on all linear layers where an engine has it
(transformers leaves that to another package), and in full. mlx-lm's class cannot be trained as it
is; two lines here mend it. Its trainer compiles the step, which pays on a GPU: `--compiled`. On
Linux all MLX engines get the BLAS that mlx_rgemma finds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINES = ("mlx_rgemma", "mlx_lm", "transformers")
KINDS = ("lora", "full")
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
SHAPE = {
    "model_type": "recurrent_gemma",
    "vocab_size": 8192,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "hidden_size": 512,
    "lru_width": 512,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "block_types": ["recurrent", "recurrent", "attention"],
    "attention_window_size": 512,
    "logits_soft_cap": 30.0,
}


def make_model(folder: Path) -> None:
    """Write a random model in Hugging Face's layout."""
    import mlx.core as mx

    from mlx_rgemma import GriffinConfig, Model
    from mlx_rgemma.checkpoints.save import save_model
    from mlx_rgemma.tuner.init import initialize

    model = Model(GriffinConfig.from_dict(SHAPE))
    initialize(model, seed=0)
    save_model(folder, model, dtype=mx.float32)


def mlx_step(
    engine: str, folder: str, kind: str, tokens: int, compiled: bool
) -> Callable[[], float]:
    """One step of training in MLX: loss, gradients, Adam."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    import numpy as np

    ids = mx.array(np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (1, tokens + 1)))
    mx.random.seed(0)
    if engine == "mlx_rgemma":
        from mlx_rgemma import load_model
        from mlx_rgemma.adapters.files import AdapterConfig, add_adapters
        from mlx_rgemma.cpu.adam import fuse_adam
        from mlx_rgemma.tuner.data.packing import Batch
        from mlx_rgemma.tuner.loss import batch_loss

        model: Any = load_model(folder, dtype="float32")[0]
        add_adapters(model, AdapterConfig(kind, -1, **LORA))
        batch = Batch(ids[:, :-1], ids[:, 1:], mx.ones((1, tokens), mx.bool_))

        def loss(model: Any) -> mx.array:
            return batch_loss(model, batch)[0] / tokens

        optimizer = fuse_adam(optim.Adam(learning_rate=1e-5))
    else:
        import mlx_lm.models.recurrent_gemma as theirs
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load_model as load

        make = theirs.Model.__init__

        def mended(self: Any, config: Any) -> None:
            nn.Module.__init__(self)
            make(self, config)

        theirs.Model.__init__ = mended
        model = load(Path(folder))[0]
        model.freeze()
        if kind == "lora":
            linear_to_lora_layers(model, -1, dict(LORA))
        else:
            for layer in model.layers:
                layer.unfreeze()

        def loss(model: Any) -> mx.array:
            return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

        optimizer = optim.Adam(learning_rate=1e-5)

    model.train()
    gradients = nn.value_and_grad(model, loss)
    mx.eval(model.parameters())

    def update() -> mx.array:
        value, found = gradients(model)
        optimizer.update(model, found)
        return value

    state = [model.state, optimizer.state]
    # mlx-lm's trainer compiles its step.
    run = mx.compile(update, inputs=state, outputs=state) if compiled else update

    def step() -> float:
        value = run()
        mx.async_eval(value, state)  # the next step is prepared while the weights are updated
        return float(value.item())

    return step


def transformers_step(folder: str, tokens: int, threads: int) -> Callable[[], float]:
    """One step of training in full in PyTorch, but for the embedding, as above."""
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights = load_file(Path(folder) / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("conv_1d.weight"):  # MLX's layout is (D, K, 1)
            weights[name] = value.transpose(1, 2).contiguous()
    model.load_state_dict(weights, strict=False)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in model.model.layers.parameters():
        parameter.requires_grad = True
    ids = torch.tensor(np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (1, tokens + 1)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-5)

    def step() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:])
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


SECONDS = 10.0
"""Of steps in a process, at least: on a busy machine a few short ones say little."""


def measure(
    engine: str, folder: str, kind: str, tokens: int, repeats: int, compiled: bool
) -> dict[str, float]:
    """In this process: the first loss, the median time of several steps, memory."""
    threads = int(os.environ.get("OPENBLAS_NUM_THREADS", os.cpu_count() or 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if engine == "transformers":
        step = transformers_step(folder, tokens, threads)
    else:
        step = mlx_step(engine, folder, kind, tokens, compiled)
    loss = step()
    wall, processor = [], []
    while len(wall) < repeats or sum(wall) < SECONDS:
        started, used = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    found = {
        "loss": loss,
        "tokens_per_second": tokens / statistics.median(wall),
        "tokens_per_processor_second": tokens / statistics.median(processor),
        "process_mb": peak * unit / 1e6,
        "process_mb_before": before * unit / 1e6,
    }
    if engine != "transformers":
        import mlx.core as mx

        found["mlx_peak_mb"] = mx.get_peak_memory() / 1e6
    return found


def main() -> None:
    """Measure every engine in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--compiled", action="store_true", help="Compile mlx-lm's step.")
    parser.add_argument("--repeats", type=int, default=3, help="Steps, at least.")
    parser.add_argument("--timeout", type=int, default=900, help="Seconds for one process.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, engine, kind, tokens = json.loads(args.worker)
        print(json.dumps(measure(engine, folder, kind, tokens, args.repeats, args.compiled)))
        return
    print("| training | tokens | engine | loss | tokens/s | tokens/CPU s | process, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place) / "model")
        make_model(Path(folder))
        for kind in args.kinds:
            for tokens in args.tokens:
                for engine in args.engines:
                    if (engine, kind) != ("transformers", "lora"):
                        job = [folder, engine, kind, tokens]
                        print(f"| {kind} | {tokens} | {engine} | {row(job, args)} |", flush=True)


def row(job: list[Any], args: argparse.Namespace) -> str:
    """The measured cells of one process."""
    command = [sys.executable, __file__, "--repeats", str(args.repeats)]
    command += ["--worker", json.dumps(job)]
    command += ["--compiled"] if args.compiled and job[1] == "mlx_lm" else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return f"not within {args.timeout} s | | | "
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]} | | | "
    found = json.loads(done.stdout.splitlines()[-1])
    return (
        f"{found['loss']:.4f} | {found['tokens_per_second']:.0f} |"
        f" {found['tokens_per_processor_second']:.0f} | {found['process_mb']:.0f}"
    )


if __name__ == "__main__":
    import mlx_rgemma  # noqa: F401  (before NumPy: OpenBLAS's threads)

    main()
