"""Time from a command to its first token, and its stages: `python -m benchmarks.startup`."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import OURS
from benchmarks.harness.processes import ROOT, Worker
from mlx_rgemma import cli
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation import machine
from mlx_rgemma.io.markdown import markdown_table

PROBE = "benchmarks.startup_probe"
TITLES = {
    "python": "start of Python",
    "package": "import of this package",
    "mlx": "import of MLX",
    "mlx_lm": "import of mlx-lm",
    "transformers": "import of transformers",
    "tokenizer": "tokenizer",
    "weights": "weights",
    "rest": "arguments, prompt, first token",
}
"""Stages from the start to the first token, in words."""


@dataclass
class Startup:
    """Seconds, measured several times, each in a new process.

    Attributes:
        facts: Facts about the machine and this package.
        commands: Whole commands, from start to exit.
        stages: Stages until the first token; no second counts twice.
    """

    facts: dict[str, Any]
    commands: dict[str, list[float]] = field(default_factory=dict)
    stages: dict[str, list[float]] = field(default_factory=dict)

    @property
    def first_token_s(self) -> float:
        """Return the seconds from start to first token: the sum of the stages' medians."""
        return sum(statistics.median(times) for times in self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "machine": self.facts,
            "commands_s": {name: _summary(times) for name, times in self.commands.items()},
            "stages_s": {name: _summary(times) for name, times in self.stages.items()},
            "first_token_s": self.first_token_s,
        }

    def text(self) -> str:
        """Return the figures as a table in Markdown."""
        rows = [_row(f"`{name}`", times) for name, times in self.commands.items()]
        rows += [_row(TITLES[name], times) for name, times in self.stages.items() if any(times)]
        return "\n".join(
            [
                *machine.header(self.facts),
                "",
                markdown_table(("", "median", "fastest", "slowest"), rows),
                f"\nFirst token after {self.first_token_s:.2f} s.",
            ]
        )


def measure(model: str | None, repeats: int) -> Startup:
    """Start commands repeatedly, after a first run that warms the disk's cache.

    Args:
        model: Folder or Hub repository; None for the embedded model.
        repeats: Timed runs.

    Raises:
        UserError: If a command fails.
    """
    with Worker(OURS) as worker:
        found = Startup(worker.request("describe"))
    named = [] if model is None else ["--model", model]
    generate = ["-m", "mlx_rgemma.generate", "--max-tokens", "1", *named]
    commands = {
        "import mlx_rgemma": ["-c", "import mlx_rgemma"],
        "mlx_rgemma.generate --help": ["-m", "mlx_rgemma.generate", "--help"],
        "mlx_rgemma.generate --max-tokens 1": generate,
    }
    for trial in range(repeats + 1):
        for name, arguments in commands.items():
            seconds, _ = _timed(arguments)
            if trial:
                found.commands.setdefault(name, []).append(seconds)
        _, output = _timed(["-m", PROBE, str(time.time()), *generate[2:]])
        seconds_of = json.loads(output.splitlines()[-1])
        for name in TITLES if trial else ():
            found.stages.setdefault(name, []).append(seconds_of.get(name, 0.0))
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Folder or Hub repository. Default: the embedded model.")
    parser.add_argument("--num-trials", "-n", type=cli.int_at_least(1), default=5)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Also write JSON to a file.")
    args = parser.parse_args(argv)

    def command() -> None:
        found = measure(args.model, args.num_trials)
        if args.output is not None:
            args.output.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
        print(found.text())

    return cli.run(command)


def _timed(arguments: list[str]) -> tuple[float, str]:
    """Return the seconds of a Python process, and its output."""
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - begin
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(arguments)} fails: {last.removeprefix('error: ')}")
    return seconds, result.stdout


def _summary(times: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(times), "low": min(times), "high": max(times)}


def _row(title: str, times: list[float]) -> list[str]:
    cells = (statistics.median(times), min(times), max(times))
    return [title, *(f"{seconds * 1e3:.0f} ms" for seconds in cells)]


if __name__ == "__main__":
    sys.exit(main())
