"""Speed and memory beside other packages: `python -m benchmarks.compare --help`."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import plot, report, runs
from benchmarks.harness.engines import BASELINES
from benchmarks.harness.plan import Plan
from mlx_rgemma import cli
from mlx_rgemma.benchmark import FLATNESS, UNQUANTIZED, add_list_argument, one_of
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import DTYPES, SHAPES
from mlx_rgemma.io.atomic import atomic_file, check_target

DEFAULTS = {"prompt_tokens": (512,), "generation_tokens": 1024, "after": ()}


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = cli.make_parser(
        "benchmarks.compare",
        "Measure this package and others on the same weights, each in a process of its own.",
        ["--shape 40m -p 512,2048 --compare mlx-lm,transformers --plot speed.svg"],
        epilog="LIST is one value or several, separated by commas: each is measured.",
    )
    count, number = cli.int_at_least, cli.float_between
    group = parser.add_argument_group("model")
    add, add_list = group.add_argument, partial(add_list_argument, group)
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--shape", choices=SHAPES, help="Random weights of this shape in place of a model.")
    add_list("--dtype", None, one_of("dtype", DTYPES), "dtypes of the weights.")
    add_list("--quantize", "-q", str, "Bits (4), a mode (mxfp4), a recipe (rgemma), or none.")
    group = parser.add_argument_group("measurements")
    add, add_list = group.add_argument, partial(add_list_argument, group)
    names = ", ".join(BASELINES)
    add_list("--compare", None, one_of("engine", BASELINES), f"Engines: {names} (extra: parity).")
    add_list("--prompt-tokens", "-p", count(1), "Tokens of the prompt. Default: 512.")
    add("--generation-tokens", "-g", type=count(2), help="Tokens to generate. Default: 1024.")
    add_list("--batch-size", "-b", count(1), "Prompts at once. Default: 1.")
    add("--num-trials", "-n", type=count(1), default=5, help="Timed runs. Default: %(default)s.")
    add("--warmup", type=count(0), default=1, help="Runs before them. Default: %(default)s.")
    add("--delay", type=number(0, 86400), default=0, help="Seconds before each. Default: 0.")
    add("--prefill-step-size", type=count(1), default=2048, help="Default: %(default)s.")
    add_list("--after", None, count(1), "Also time generation after reading this many tokens.")
    add(
        "--flatness",
        action="store_true",
        help="Prompts of 2,048 and 32,768 tokens, generation after 100 and 100,000.",
    )
    add_list("--train-tokens", "-t", count(1), "Also time training on sequences of this length.")
    add(
        "--fine-tune-type",
        choices=("full", "lora"),
        default="full",
        help="Trained weights. Default: full.",
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="Print one JSON object, and nothing else.")
    add("--output", type=Path, metavar="FILE", help="Also write the JSON object to a file.")
    add("--plot", type=Path, metavar="FILE", help="Draw speed against length (extra: plot).")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _compare(args))


def _compare(args: argparse.Namespace) -> None:
    found = runs.prepare(_plan(args))
    for path in (args.plot, args.output):
        if path is not None:
            check_target(path)
    if args.plot is not None:
        plot.check(args.plot)
    # With --json the object has standard output to itself.
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    runs.run(
        found,
        lambda begun: say(report.opening(begun)),
        lambda running, result: say(report.trial(running, result)),
    )
    if args.plot is not None:
        title = f"{found.name} on {found.facts['cpu']}, {found.facts['device'].upper()}"
        plot.plot(args.plot, title, found.results)
    values = runs.as_json(found)
    if args.output is not None:
        with atomic_file(args.output) as file:
            file.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values, indent=1) if args.json else f"\n{report.closing(found)}")


def _plan(args: argparse.Namespace) -> Plan:
    if args.model is not None and args.shape is not None:
        raise UserError("--model and --shape: found both, expected one.")
    for name, value in (DEFAULTS | (FLATNESS if args.flatness else {})).items():
        setattr(args, name, getattr(args, name) or value)
    return Plan(
        shape=args.shape,
        model=args.model,
        prompt_tokens=args.prompt_tokens,
        generation_tokens=args.generation_tokens,
        batch_sizes=args.batch_size or (1,),
        after=args.after,
        train_tokens=args.train_tokens,
        training=args.fine_tune_type,
        dtypes=args.dtype or (None,),
        quantizations=args.quantize or (UNQUANTIZED,),
        baselines=args.compare,
        trials=args.num_trials,
        warmup=args.warmup,
        delay=args.delay,
        step_size=args.prefill_step_size,
    )


if __name__ == "__main__":
    sys.exit(main())
