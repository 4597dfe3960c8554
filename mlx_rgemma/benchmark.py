"""The command `python -m mlx_rgemma.benchmark`: speed, memory, and how they compare."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rgemma import cli
from mlx_rgemma.errors import shown
from mlx_rgemma.griffin.config import DTYPES
from mlx_rgemma.io.atomic import atomic_file, check_target
from mlx_rgemma.measurement.engines import PEERS
from mlx_rgemma.measurement.shapes import SHAPES, UNQUANTIZED

if TYPE_CHECKING:
    from mlx_rgemma.measurement.plan import Plan

PROMPT, GENERATION = (512,), 1024
"""mlx-lm's."""

MAX_TOKENS, MAX_BATCH = 1 << 24, 1 << 12
"""More would fill any memory before the first figure."""

FLAT_PROMPTS, FLAT_AFTER, FLAT_GENERATION = (2048, 32768), (100, 100_000), 128
"""What `--flatness` compares, unless other lengths are asked for."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and more."""
    parser = cli.make_parser(
        "mlx_rgemma.benchmark",
        "Measure how fast a model reads, generates and trains, and what it takes.",
        [
            "-p 512 -g 128 -n 3",
            "--model google/recurrentgemma-2b-it -p 512,2048 -q none,4 --output speed.json",
            "--shape 2b --flatness --plot flat.svg",
        ],
        epilog="LIST is one value or several, separated by commas: each is measured.",
    )
    count, number = cli.int_at_least, cli.float_between
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--shape", choices=SHAPES, help="Random weights of this shape in place of a model.")
    _add_list(
        model,
        "--dtype",
        None,
        _one_of("dtype", DTYPES),
        "dtypes of the weights. Default: float32 on a CPU, the file's own on a GPU.",
    )
    _add_list(
        model,
        "--quantize",
        "-q",
        str,
        "Quantizations: bits (4), a mode (mxfp4), a recipe (rgemma), or none. Default: none.",
    )
    add("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    group = parser.add_argument_group("measurements")
    add = group.add_argument
    _add_list(
        group, "--prompt-tokens", "-p", count(1, MAX_TOKENS), "Tokens of the prompt. Default: 512."
    )
    add(
        "--generation-tokens",
        "-g",
        type=count(2, MAX_TOKENS),
        help=f"Tokens to generate. Default: {GENERATION}.",
    )
    _add_list(group, "--batch-size", "-b", count(1, MAX_BATCH), "Prompts at once. Default: 1.")
    add("--num-trials", "-n", type=count(1), default=5, help="Timed runs. Default: %(default)s.")
    add("--warmup", type=count(0), default=1, help="Runs before them. Default: %(default)s.")
    add(
        "--delay", type=number(0, 86400), default=0, help="Seconds to rest before each. Default: 0."
    )
    add(
        "--prefill-step-size",
        type=count(1),
        default=2048,
        help="Tokens of a prompt to read at a time. Default: %(default)s.",
    )
    _add_list(
        group, "--train-tokens", "-t", count(1, MAX_TOKENS), "Also time training on rows as long."
    )
    add("--fine-tune-type", choices=("full", "lora"), default="full", help="What is trained.")
    _add_list(
        group,
        "--after",
        None,
        count(1, MAX_TOKENS),
        "Also time generation after reading so much, three times as often.",
    )
    add(
        "--flatness",
        action="store_true",
        help="What length costs: prompts of 2,048 and 32,768, generation after 100 and 100,000.",
    )
    _add_list(
        group,
        "--compare",
        None,
        _one_of("engine", PEERS),
        f"Others to run on the same weights: {', '.join(PEERS)} (extra: parity).",
    )
    add("--startup", action="store_true", help="Time the way to the first token instead.")
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="Print one JSON object, and nothing else.")
    add("--output", type=Path, metavar="FILE", help="Also write the figures to a file, as JSON.")
    add("--plot", type=Path, metavar="FILE", help="Draw speed against length (extra: plot).")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _startup(args) if args.startup else _benchmark(args))


def _benchmark(args: argparse.Namespace) -> None:
    from mlx_rgemma.measurement import plot, report, runs

    found = runs.prepare(_plan(args))
    for path in (args.plot, args.output):
        if path is not None:
            check_target(path)
    if args.plot is not None:
        plot.check(args.plot)
    # Where JSON is asked for, it has standard output to itself.
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    runs.run(
        found,
        lambda begun: say(report.opening(begun)),
        lambda running, result: say(report.trial(running, result)),
    )
    if args.plot is not None:
        title = f"{found.name} on {found.facts['cpu']}, {found.facts['device'].upper()}"
        plot.plot(args.plot, title, found.results)
    _print(args, runs.as_json(found), f"\n{report.closing(found)}")


def _startup(args: argparse.Namespace) -> None:
    from mlx_rgemma.measurement import startup

    if args.output is not None:
        check_target(args.output)
    found = startup.measure(args.model, args.num_trials)
    _print(args, found.as_dict(), found.text())


def _print(args: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    if args.output is not None:
        with atomic_file(args.output) as file:
            file.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values, indent=1) if args.json else text)


def _plan(args: argparse.Namespace) -> Plan:
    from mlx_rgemma.errors import UserError
    from mlx_rgemma.measurement.plan import Plan

    if args.model is not None and args.shape is not None:
        raise UserError("--model and --shape: found both, expected one.")
    flat = args.flatness
    return Plan(
        shape=args.shape,
        model=args.model,
        prompt_tokens=args.prompt_tokens or (FLAT_PROMPTS if flat else PROMPT),
        generation_tokens=args.generation_tokens or (FLAT_GENERATION if flat else GENERATION),
        batch_sizes=args.batch_size or (1,),
        after=args.after or (FLAT_AFTER if flat else ()),
        train_tokens=args.train_tokens,
        training=args.fine_tune_type,
        dtypes=args.dtype or (None,),
        quantizations=args.quantize or (UNQUANTIZED,),
        peers=args.compare,
        trials=args.num_trials,
        warmup=args.warmup,
        delay=args.delay,
        step_size=args.prefill_step_size,
    )


def _add_list(
    parser: argparse._ActionsContainer,
    name: str,
    short: str | None,
    item: Callable[[str], Any],
    help: str,
) -> None:
    """An argument of one value or several, separated by commas, each once."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    parse.__name__ = getattr(item, "__name__", "value")
    names = [name] if short is None else [name, short]
    parser.add_argument(*names, type=parse, default=(), metavar="LIST", help=help)


def _one_of(what: str, names: Any) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{shown(text)} is none of {', '.join(names)}")
        return text

    parse.__name__ = what
    return parse


if __name__ == "__main__":
    sys.exit(main())
