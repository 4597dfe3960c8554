"""The command `mlx_rgemma.evaluate`: run tasks of the lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mlx_rgemma import cli
from mlx_rgemma.errors import shown
from mlx_rgemma.griffin.config import DTYPES

MAX_SEED = 2**32 - 1
"""NumPy's, which the harness seeds."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and a few more."""
    parser = cli.make_parser(
        "mlx_rgemma.evaluate",
        "Evaluate RecurrentGemma with the lm-evaluation-harness (pip install '.[evaluate]' in a"
        " clone).",
        [
            "--model google/recurrentgemma-2b --tasks hellaswag piqa --output-dir results",
            "--tasks arc_easy --limit 100",
        ],
    )
    count = cli.int_at_least
    add = parser.add_argument_group("model").add_argument
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--adapter-path", help="Folder with trained adapter weights and config.")
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights. Default: float32 on a CPU, that of the file on a GPU.",
    )
    add("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", nargs="+", required=True, help="Tasks, as 'lm-eval ls tasks' lists them.")
    add("--include-path", metavar="FOLDER", help="Folder with more tasks, as YAML files.")
    add("--output-dir", default=".", help="Folder for the results. Default: the current one.")
    add(
        "--batch-size",
        type=count(1),
        default=8,
        help="Prompts per batch. Default: %(default)s.",
    )
    add("--num-shots", type=count(0), help="Examples before each question. Default: the task's.")
    add("--max-tokens", type=count(1), help="Tokens per answer, at most. Default: the task's.")
    add("--limit", type=count(1), help="Questions per task. Default: all.")
    add(
        "--seed",
        type=count(0, MAX_SEED),
        default=123,
        help="Seed of the examples. Default: %(default)s.",
    )
    add(
        "--fewshot-as-multiturn",
        action="store_true",
        help="Give the examples as turns of a conversation.",
    )
    add(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="Apply the chat template to questions. Default: if the model has one.",
    )
    add("--chat-template-args", type=_object, default={}, help="JSON object for the template.")
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Allow tasks that run generated code, as humaneval does.",
    )
    add("--log-samples", action="store_true", help="Save every question and answer, too.")
    add = parser.add_argument_group("sampling").add_argument
    for name, default in (("temp", 0.0), ("top_p", 1.0), ("top_k", 0)):
        cli.add_option(add, name, default)
    return parser


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"not JSON: {shown(text)}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> None:
    import os

    import mlx.core as mx

    from mlx_rgemma.checkpoints.load import load
    from mlx_rgemma.evaluation.harness import evaluate, results_table, write_results
    from mlx_rgemma.generation.options import SamplingOptions
    from mlx_rgemma.io.hub import locate

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it would warn when the harness forks
    mx.random.seed(args.seed)
    model, tokenizer = load(args.model, dtype=args.dtype, adapter_path=args.adapter_path)
    sampling = SamplingOptions(args.temp, args.top_p, top_k=args.top_k)
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
        sampler=sampling.functions(tokenizer, model.args.vocab_size)[0],
    )
    kept: dict[str, Any] = {key: found[key] for key in ("results", "samples") if key in found}
    name = args.model or locate(None).name
    path = write_results(Path(args.output_dir), name, args.tasks, kept)
    print(results_table(found["results"]))
    print(f"\nWrote {path}.")


if __name__ == "__main__":
    sys.exit(main())
