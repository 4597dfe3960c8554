"""The command `mlx_rgemma.benchmark`: speed and memory on this machine, as a report to paste.

It follows mlx-lm's benchmark: the same flags, prompts of random tokens, and one line per trial.
`benchmarks/` in a clone of the repository compares with other packages.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlx_rgemma import cli
from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.griffin.config import DTYPES, SHAPES
from mlx_rgemma.io.atomic import atomic_file, check_target
from mlx_rgemma.io.markdown import markdown_table

UNQUANTIZED = "none"

DEFAULTS = {"prompt_tokens": (512,), "generation_tokens": 1024, "num_trials": 5}
"""mlx-lm's."""

MAX_TOKENS, MAX_BATCH = 1 << 24, 1 << 12
"""More would fill any memory before the first figure."""

QUICK = {"prompt_tokens": (128,), "generation_tokens": 32, "num_trials": 2}

FLATNESS = {"prompt_tokens": (2048, 32768), "generation_tokens": 128, "after": (100, 100_000)}

DECODE_TRIALS_FACTOR = 3
"""Cases that only decode are short and noisy: they get more trials."""

MOVED = {
    "--compare": "benchmarks.compare",
    "--plot": "benchmarks.compare",
    "--startup": "benchmarks.startup",
}
"""Flags of the measuring harness, by the module that has them now."""


class Case(NamedTuple):
    """One thing to time; lengths in tokens.

    Attributes:
        kind: "prompt": read a prompt and generate; "after": generate after reading a long text;
            "training": a training step.
        length: Of the prompt, of the text, or of a sequence.
        batch_size: Prompts or sequences at once.
    """

    kind: str
    length: int
    batch_size: int = 1

    def __str__(self) -> str:
        title = "generation after" if self.kind == "after" else self.kind
        batch = f", batch {self.batch_size}" if self.batch_size > 1 else ""
        return f"{title} {self.length:,}{batch}"


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and more."""
    parser = cli.make_parser(
        "mlx_rgemma.benchmark",
        "Measure the speed and the memory of prefill, decoding and training on this machine.",
        [
            "--quick",
            "-p 512 -g 128 -n 3",
            "--model google/recurrentgemma-2b-it -p 512,2048 -q none,4 --output speed.json",
        ],
        epilog="LIST is one value or several, separated by commas: each is measured.",
    )
    count, number = cli.int_at_least, cli.float_between
    group = parser.add_argument_group("model")
    add, add_list = group.add_argument, partial(add_list_argument, group)
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--shape", choices=SHAPES, help="Random weights of this shape in place of a model.")
    default = "Default: float32 on a CPU, the file's own on a GPU."
    add_list("--dtype", None, one_of("dtype", DTYPES), f"dtypes of the weights. {default}")
    quantizations = "Quantizations: bits (4), a mode (mxfp4), a recipe (rgemma), or none."
    add_list("--quantize", "-q", str, f"{quantizations} Default: none.")
    add("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    group = parser.add_argument_group("measurements")
    add, add_list = group.add_argument, partial(add_list_argument, group)
    add("--quick", action="store_true", help="Short: 128 tokens, 32 more, two trials.")
    add_list("--prompt-tokens", "-p", count(1, MAX_TOKENS), "Tokens of the prompt. Default: 512.")
    add(
        "--generation-tokens",
        "-g",
        type=count(2, MAX_TOKENS),
        help="Tokens to generate. Default: 1024.",
    )
    add_list("--batch-size", "-b", count(1, MAX_BATCH), "Prompts at once. Default: 1.")
    add("--num-trials", "-n", type=count(1), help="Timed runs. Default: 5.")
    add("--warmup", type=count(0), default=1, help="Runs before them. Default: %(default)s.")
    add("--delay", type=number(0, 86400), default=0, help="Seconds before each. Default: 0.")
    add(
        "--prefill-step-size",
        type=count(1),
        default=2048,
        help="Tokens of a prompt to read at a time. Default: %(default)s.",
    )
    add_list(
        "--after",
        None,
        count(1, MAX_TOKENS),
        "Also time generation after reading this many tokens.",
    )
    add(
        "--flatness",
        action="store_true",
        help="Prompts of 2,048 and 32,768 tokens, generation after 100 and 100,000.",
    )
    add_list(
        "--train-tokens",
        "-t",
        count(1, MAX_TOKENS),
        "Also time training on sequences of this length.",
    )
    add(
        "--fine-tune-type",
        choices=("full", "lora"),
        default="full",
        help="Trained weights. Default: full.",
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="Print one JSON object, and nothing else.")
    add("--output", type=Path, metavar="FILE", help="Also write the JSON object to a file.")
    for flag in MOVED:
        parser.add_argument(flag, nargs="?", action=_Moved, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _benchmark(args))


def _benchmark(args: argparse.Namespace) -> None:
    defaults = DEFAULTS | (QUICK if args.quick else {}) | (FLATNESS if args.flatness else {})
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name) or value)
    if args.model is not None and args.shape is not None:
        raise UserError("--model and --shape: found both, expected one.")
    if args.output is not None:
        check_target(args.output)

    from mlx_rgemma.evaluation import machine
    from mlx_rgemma.evaluation.random_model import recipe

    for label in args.quantize:
        recipe(label)
    name = f"{args.shape}, random weights" if args.shape else _source(args.model)
    facts = machine.describe()
    # With --json the object has standard output to itself.
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    say("\n".join([*machine.header(facts), f"Model: {name}\n"]))
    results = [
        result
        for dtype in args.dtype or (None,)
        for label in args.quantize or (UNQUANTIZED,)
        for result in _measure(args, dtype, label, say)
    ]
    report = {"machine": facts, "model": name, "results": results}
    if args.output is not None:
        with atomic_file(args.output) as file:
            file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1) if args.json else f"\n{_tables(results)}")


def _source(model: str | None) -> str:
    from mlx_rgemma.io.hub import locate

    return locate(model).name


def cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases to time. Training comes last: it changes the model."""
    batches = args.batch_size or (1,)
    return [
        *(Case("prompt", n, batch) for n in args.prompt_tokens for batch in batches),
        *(Case("after", n) for n in args.after),
        *(Case("training", n, batch) for n in args.train_tokens for batch in batches),
    ]


def _measure(
    args: argparse.Namespace, dtype: str | None, label: str, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Load the model in one dtype and quantization, and yield the result of each case."""
    import mlx.core as mx
    import mlx_lm.generate  # noqa: F401  (the import takes seconds: not to be timed)
    from mlx.utils import tree_flatten

    from mlx_rgemma.evaluation.machine import copy_bandwidth
    from mlx_rgemma.evaluation.timing import dequantized_bytes, quantization_label

    model = _load(args, dtype, label)
    weights: Any = tree_flatten(model.parameters())
    weight_bytes = sum(value.nbytes for _, value in weights)
    read_bytes = weight_bytes + dequantized_bytes(model)
    loaded = {
        "dtype": str(model.model.final_norm.weight.dtype).removeprefix("mlx.core."),
        "quantization": quantization_label(model),
    }
    for case in cases(args):
        trial = _trial(args, model, case)
        trials: list[dict[str, float]] = []
        bandwidth = copy_bandwidth()
        count = args.num_trials * (DECODE_TRIALS_FACTOR if case.kind == "after" else 1)
        for number in range(1 - args.warmup, count + 1):
            time.sleep(args.delay)
            mx.reset_peak_memory()
            figures = trial()
            if number < 1:
                continue
            trials.append({**figures, "peak_memory": mx.get_peak_memory() / 1e9})
            line = ", ".join(f"{k}={v:.3f}" for k, v in trials[-1].items() if k != "state_bytes")
            say(f"Trial {number}:  {case}: {line}")
        result = {
            **loaded,
            **case._asdict(),
            **{name: _spread([t[name] for t in trials]) for name in trials[0]},
            "weight_bytes": weight_bytes,
        }
        if "state_bytes" in result:
            result["state_bytes"] = trials[0]["state_bytes"]
            read = (read_bytes + trials[0]["state_bytes"]) / case.batch_size
            result["bandwidth_share"] = result["generation_tps"]["median"] * read / bandwidth
        yield result


def _load(args: argparse.Namespace, dtype: str | None, label: str) -> Any:
    import mlx.core as mx

    from mlx_rgemma.checkpoints.load import load_model
    from mlx_rgemma.evaluation.random_model import quantize, random_model

    if args.shape is not None:
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        chosen = dtype or ("float32" if on_cpu else "bfloat16")
        return random_model(SHAPES[args.shape], getattr(mx, chosen), label)
    model, config = load_model(args.model, dtype=dtype, lazy=True)
    if config.quantization is not None and label != UNQUANTIZED:
        raise UserError(f"--quantize {label}: the model is quantized already.")
    quantize(model, label)
    model.eval()
    mx.eval(model.parameters())
    model.prepare_for_inference()
    return model


def _trial(args: argparse.Namespace, model: Any, case: Case) -> Callable[[], dict[str, float]]:
    """Return the function that runs one trial of a case and returns its figures."""
    from copy import deepcopy

    import mlx.core as mx
    import mlx.optimizers as optim

    from mlx_rgemma.evaluation import timing
    from mlx_rgemma.ops import backend

    tokens, step_size = args.generation_tokens, args.prefill_step_size
    dice = random.Random(0)
    length = case.length + (case.kind == "training")
    ids = [
        [dice.randrange(model.args.vocab_size) for _ in range(length)]
        for _ in range(case.batch_size)
    ]

    def read(prompt: mx.array, cache: list[Any], tokens: int) -> timing.Generated:
        mx.eval(prompt)
        begin = time.perf_counter()
        steps = timing.stream_tokens(model, prompt, cache, tokens, step_size)
        return timing.time_tokens(steps, begin, cache)

    def figures(done: timing.Generated) -> dict[str, float]:
        seconds = done.last_token_s - done.first_token_s
        return {
            "prompt_tps": case.length * case.batch_size / done.first_token_s,
            "first_token_s": done.first_token_s,
            "generation_tps": case.batch_size * (done.tokens - 1) / seconds,
            "total_time": done.last_token_s,
            "state_bytes": done.state_bytes,
        }

    if case.kind == "training":
        optimizer = backend.optimizer(optim.AdamW(timing.LEARNING_RATE))
        step = timing.TrainingStep(
            model, timing.mean_loss, optimizer, args.fine_tune_type, compiled=False
        )

        def train() -> dict[str, float]:
            seconds = step.seconds(mx.array(ids))
            return {
                "training_tps": case.length * case.batch_size / seconds,
                "total_time": seconds,
            }

        return train
    if case.kind == "after":
        state = model.make_cache()
        read(mx.array(ids[0]), state, 1)

        def generate() -> dict[str, float]:
            found = figures(read(mx.array(ids[0][:1]), deepcopy(state), tokens))
            return {k: v for k, v in found.items() if k not in ("prompt_tps", "first_token_s")}

        return generate
    if case.batch_size > 1:
        return lambda: figures(timing.time_batch(model, ids, tokens, step_size))
    return lambda: figures(read(mx.array(ids[0]), model.make_cache(), tokens))


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "values": list(values),
    }


Column = tuple[str, Callable[[dict[str, Any]], str]]


def _tables(results: Sequence[dict[str, Any]]) -> str:
    """Return the medians, with the slowest and the fastest trial, as tables in Markdown."""
    model: list[Column] = [
        ("dtype", lambda r: r["dtype"]),
        ("quantization", lambda r: r["quantization"]),
        ("batch", lambda r: str(r["batch_size"])),
    ]
    memory: Column = ("peak memory", lambda r: f"{r['peak_memory']['median']:.2f} GB")
    decode: list[Column] = [
        ("generation tokens/s", lambda r: _speed(r["generation_tps"])),
        ("of the bandwidth", lambda r: f"{r['bandwidth_share']:.0%}"),
        ("state", lambda r: f"{r['state_bytes'] / 1e6:.2f} MB"),
        memory,
    ]
    columns: dict[str, list[Column]] = {
        "prompt": [
            ("prompt", lambda r: f"{r['length']:,}"),
            ("prompt tokens/s", lambda r: _speed(r["prompt_tps"])),
            ("first token", lambda r: f"{r['first_token_s']['median'] * 1e3:,.0f} ms"),
            *decode,
        ],
        "after": [("tokens read", lambda r: f"{r['length']:,}"), *decode],
        "training": [
            ("sequence", lambda r: f"{r['length']:,}"),
            ("training tokens/s", lambda r: _speed(r["training_tps"])),
            memory,
        ],
    }
    tables = []
    for kind, shown_columns in columns.items():
        found = [result for result in results if result["kind"] == kind]
        if found:
            chosen = [*model, *shown_columns]
            rows = [[cell(result) for _, cell in chosen] for result in found]
            tables.append(markdown_table([title for title, _ in chosen], rows))
    return "\n\n".join(tables)


def _speed(spread: dict[str, Any]) -> str:
    digits = 0 if spread["median"] >= 100 else 1
    median, low, high = (f"{spread[key]:,.{digits}f}" for key in ("median", "low", "high"))
    return median if len(spread["values"]) == 1 else f"{median} ({low} to {high})"


class _Moved(argparse.Action):
    """A flag that the measuring harness has now."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        parser.error(
            f"{option} is a flag of python -m {MOVED[option]}, in a clone of the repository"
        )


def add_list_argument(
    group: argparse._ActionsContainer,
    name: str,
    short: str | None,
    item: Callable[[str], Any],
    help: str,
) -> None:
    """Add an argument of one value or several, separated by commas; repeated values count once."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    parse.__name__ = getattr(item, "__name__", "value")
    names = [name] if short is None else [name, short]
    group.add_argument(*names, type=parse, default=(), metavar="LIST", help=help)


def one_of(what: str, names: Any) -> Callable[[str], str]:
    """Return an argparse type: one of several names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{shown(text)} is none of {', '.join(names)}")
        return text

    parse.__name__ = what
    return parse


if __name__ == "__main__":
    sys.exit(main())
