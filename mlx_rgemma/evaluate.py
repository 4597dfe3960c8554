"""The command `python -m mlx_rgemma.evaluate`: tasks of the lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mlx_rgemma import command_line


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments: mlx-lm's, and a few more."""
    parser = argparse.ArgumentParser(
        prog="mlx_rgemma.evaluate",
        description="Evaluate RecurrentGemma with the lm-evaluation-harness"
        " (pip install 'mlx-rgemma[evaluate]').",
    )
    count, number = command_line.count, command_line.number
    add = parser.add_argument
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--tasks", nargs="+", required=True, help="Tasks, as 'lm-eval ls tasks' lists them.")
    add("--include-path", metavar="FOLDER", help="Folder with tasks of your own, as YAML files.")
    add("--output-dir", default=".", help="Folder for the results. Default: this one.")
    add(
        "--batch-size",
        type=count(1),
        default=8,
        help="Prompts that are answered at once. Default: %(default)s.",
    )
    add("--num-shots", type=count(0), help="Examples before each question. Default: the task's.")
    add("--max-tokens", type=count(1), help="Most tokens of an answer. Default: the task's.")
    add("--limit", type=count(1), help="Questions of each task to ask. Default: all.")
    add("--seed", type=int, default=123, help="Seed of the examples. Default: %(default)s.")
    add(
        "--fewshot-as-multiturn",
        action="store_true",
        help="Give the examples as turns of a conversation.",
    )
    add(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="Put questions in the chat template. Default: if the model has one.",
    )
    add("--chat-template-args", type=_object, default={}, help="JSON object for the template.")
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Allow tasks that run code which the model wrote, as humaneval does.",
    )
    add("--log-samples", action="store_true", help="Keep every question and answer, too.")
    add("--adapter-path", help="Folder with trained adapter weights and config.")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Default: float32 on a CPU, the file's own on a GPU.",
    )
    add("--temp", type=number(0), default=0.0, help="Sampling temperature. Default: 0, greedy.")
    add("--top-p", type=number(0, 1), default=1.0, help="Sampling top-p.")
    add("--top-k", type=count(0), default=0, help="Sampling top-k; 0 for all.")
    add("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    return parser


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


_object.__name__ = "JSON object"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    return command_line.run(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> None:
    import os

    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from mlx_rgemma.checkpoints import load
    from mlx_rgemma.checkpoints.source import locate
    from mlx_rgemma.quality.harness import evaluate, results_table, write_results

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it would warn when the harness forks
    mx.random.seed(args.seed)
    model, tokenizer = load(args.model, dtype=args.dtype, adapter_path=args.adapter_path)
    found = evaluate(
        model,
        tokenizer,
        args.tasks,
        include_path=args.include_path,
        batch_size=args.batch_size,
        num_shots=args.num_shots,
        max_tokens=args.max_tokens,
        limit=args.limit,
        seed=args.seed,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        apply_chat_template=args.apply_chat_template,
        chat_template_args=args.chat_template_args,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        log_samples=args.log_samples,
        sampler=make_sampler(args.temp, args.top_p, top_k=args.top_k),
    )
    kept: dict[str, Any] = {key: found[key] for key in ("results", "samples") if key in found}
    name = args.model or locate(None).name
    path = write_results(Path(args.output_dir), name, args.tasks, kept)
    print(results_table(found["results"]))
    print(f"\nWrote {path}.")


if __name__ == "__main__":
    sys.exit(main())
