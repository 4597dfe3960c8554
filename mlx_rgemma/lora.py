"""The command `mlx_rgemma.lora`: fine-tune a model, or evaluate it on a test set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mlx_rgemma import cli
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import DTYPES
from mlx_rgemma.tuner.config import (
    MAX_COUNT,
    MAX_RATE,
    MAX_SEED,
    MAX_TOKENS,
    check_keys,
    merge_config,
)

if TYPE_CHECKING:
    import mlx.core as mx

DEFAULTS: dict[str, Any] = {
    "model": None,
    "train": False,
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "optimizer_config": {},
    "data": None,
    "seed": 0,
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": 1e-5,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "save_every": 100,
    "test": False,
    "test_batches": 500,
    "max_seq_length": 2048,
    "config": None,
    "grad_checkpoint": False,
    "grad_accumulation_steps": 1,
    "clear_cache_threshold": 0,
    "lr_schedule": None,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
    "mask_prompt": False,
    "report_to": None,
    "project_name": None,
    "trust_remote_code": False,
    "hf_dataset": None,
    "pack": False,
    "carry_state": False,
    "lora_gates": False,
    "resume": False,
    "dtype": None,
    "window": "google",
}
"""mlx-lm's defaults and those of more settings; a configuration file may set any of them. Without
an explicit `num_layers`, a model of fewer layers is trained in all of them."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and a few more; None if not given."""
    count, number = cli.int_at_least, cli.float_between
    many, batches = count(1, MAX_COUNT), count(1, MAX_COUNT, unlimited=True)
    parser = cli.make_parser(
        "mlx_rgemma.lora",
        "Fine-tune a model with LoRA, QLoRA (on a quantized model), DoRA, or in full.",
        ["--train --data my-data --iters 300", "--test --data my-data", "-c lora.yaml"],
    )
    add = parser.add_argument
    switch: dict[str, Any] = {"action": "store_true", "default": None}
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--train", **switch, help="Train.")
    add("--test", **switch, help="Evaluate on the test set, after training if any.")
    add("--data", help="Folder with {train, valid, test}.jsonl, or data set of the Hub.")
    add("--fine-tune-type", choices=("lora", "dora", "full"), help="Default: lora.")
    add("--optimizer", choices=("adam", "adamw", "muon", "sgd", "adafactor"), help="Default: adam.")
    add("--mask-prompt", **switch, help="Leave prompts out of the loss.")
    add(
        "--num-layers",
        type=count(-1, MAX_COUNT),
        help="Layers to train, from the last; -1 for all. [16]",
    )
    add("--batch-size", type=count(1, MAX_TOKENS), help="Sequences per batch. [4]")
    add("--iters", type=many, help="Iterations. [1000]")
    add("--val-batches", type=batches, help="Validation batches (-1: all). [25]")
    add("--learning-rate", type=number(0, MAX_RATE), help="Learning rate. [1e-5]")
    add("--steps-per-report", type=many, help="Iterations between reports. [10]")
    add("--steps-per-eval", type=many, help="Iterations between evaluations. [200]")
    add("--grad-accumulation-steps", type=many, help="Iterations per update. [1]")
    add("--resume-adapter-file", help="Initial adapter weights.")
    add("--adapter-path", help="Folder to write, or to read with --test. [adapters]")
    add("--save-every", type=many, help="Iterations between checkpoints. [100]")
    add("--test-batches", type=batches, help="Test batches (-1: all). [500]")
    add("--max-seq-length", type=count(2, MAX_TOKENS), help="Tokens per sequence. [2048]")
    add("-c", "--config", help="YAML file of settings; the command line wins.")
    add("--grad-checkpoint", **switch, help="Less memory, about a third more time.")
    add("--clear-cache-threshold", help=argparse.SUPPRESS)
    add("--report-to", help="wandb, swanlab, or both, comma-separated.")
    add("--project-name", help="Project name for --report-to.")
    add("--seed", type=count(0, MAX_SEED), help="Seed of order, adapters and dropout. [0]")
    add("--trust-remote-code", **switch, help=argparse.SUPPRESS)
    more = parser.add_argument_group("beyond mlx-lm").add_argument
    more("--pack", **switch, help="Pack several documents into a sequence, kept apart.")
    more(
        "--carry-state",
        **switch,
        help="Read documents of any length in chunks of --max-seq-length, carrying the state.",
    )
    more("--lora-gates", **switch, help="Adapters on the recurrence's gates, too.")
    more("--resume", **switch, help="Resume the run whose checkpoint is in --adapter-path.")
    more(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights. Default: float32 on a CPU, that of the file on a GPU.",
    )
    more("--window", choices=("google", "hf"), help="Attention window of W+1 keys, or W. [google]")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _run(settings(args)))


def settings(args: argparse.Namespace) -> SimpleNamespace:
    """Merge the arguments, the configuration file and the defaults.

    Raises:
        UserError: If the file is missing or wrong, or two settings exclude each other.
    """
    from mlx_rgemma.tuner.data.datasets import FEATURES

    defaults = {**DEFAULTS, "num_layers": None}
    chosen = merge_config(build_parser(), vars(args), defaults, FEATURES)
    if not (chosen.train or chosen.test):
        raise UserError("nothing to do: give --train, --test, or both.")
    if chosen.pack and chosen.carry_state:
        raise UserError("--pack and --carry-state exclude each other; choose one.")
    if chosen.resume and not chosen.train:
        raise UserError("--resume resumes training: give --train, too.")
    if chosen.adapter_path:
        chosen.adapter_path = str(Path(chosen.adapter_path).expanduser())
    parameters = chosen.lora_parameters or {}
    check_keys("lora_parameters", parameters, ("rank", "scale", "dropout", "keys", "alpha"))
    if "alpha" not in parameters:
        chosen.lora_parameters = {**DEFAULTS["lora_parameters"], **parameters}
    return chosen


def _run(args: SimpleNamespace) -> None:
    from mlx_rgemma import distributed
    from mlx_rgemma.tuner import finetune as finetuning
    from mlx_rgemma.tuner.data.datasets import check_data
    from mlx_rgemma.tuner.run_folder import run_folder

    group = distributed.join(args.seed)
    check_data(args)
    finetuning.check(args)
    if args.train:
        with run_folder(Path(args.adapter_path), lock=distributed.rank() == 0):
            _work(args, group)
    else:
        _work(args, group)


def _work(args: SimpleNamespace, group: mx.distributed.Group | None) -> None:
    from mlx_rgemma import distributed, load
    from mlx_rgemma.tuner import finetune as finetuning
    from mlx_rgemma.tuner.data.datasets import read_examples
    from mlx_rgemma.tuner.loggers import ProgressLog, reporting, service_names

    services = service_names(args.report_to) if args.train and distributed.rank() == 0 else []
    print("Loading pretrained model")
    model, tokenizer = load(args.model, dtype=args.dtype, window=args.window, lazy=True)
    model.prepare_for_inference(dequantize=not args.grad_checkpoint)
    if model.dequantized_nbytes:
        print(
            f"Quantized weights are held in float32 too, {model.dequantized_nbytes / 1e9:.3f} GB:"
            " faster on a CPU. --grad-checkpoint saves that memory."
        )
    if args.num_layers is None:
        args.num_layers = min(DEFAULTS["num_layers"], len(model.layers))
    print("Loading datasets")
    examples = read_examples(args, tokenizer)
    if args.train:
        print("Training")
        finetuning.prepare(model, args)
        print(finetuning.parameter_line(model))
        for warning in finetuning.warnings(examples, args):
            print(f"Warning: {warning}")
        print(f"Starting training..., iters: {args.iters}")
        log = ProgressLog(None, 0, args.iters)
        with reporting(services, log, args.project_name, vars(args)) as callback:
            finetuning.train(model, examples, args, callback=callback, group=group)
    else:
        finetuning.load_trained(model, args.adapter_path)
    if args.test:
        print("Testing")
        print(finetuning.test(model, examples["test"], args))


if __name__ == "__main__":
    sys.exit(main())
