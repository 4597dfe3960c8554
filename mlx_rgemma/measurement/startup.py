"""From a command to its first token: how long, and where the time goes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from mlx_rgemma.errors import UserError
from mlx_rgemma.measurement import machine
from mlx_rgemma.measurement.engines import OURS
from mlx_rgemma.measurement.processes import Worker

PROBE = "mlx_rgemma.measurement.startup_probe"
TITLES = {
    "python": "Python starts",
    "package": "importing this package",
    "mlx": "importing MLX",
    "mlx_lm": "importing mlx-lm",
    "transformers": "importing transformers",
    "tokenizer": "reading the tokenizer",
    "weights": "reading the weights",
    "rest": "arguments, prompt, first token",
}
"""Stages on the way to the first token, in words."""


@dataclass
class Startup:
    """Seconds, each measured several times in a process of its own.

    Attributes:
        facts: About the machine and this package.
        commands: Whole commands, from start to exit.
        stages: What the way to the first token is made of; no second counts twice.
    """

    facts: dict[str, Any]
    commands: dict[str, list[float]] = field(default_factory=dict)
    stages: dict[str, list[float]] = field(default_factory=dict)

    @property
    def first_token_s(self) -> float:
        """From start to first token: the sum of the stages' medians."""
        return sum(statistics.median(times) for times in self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "machine": self.facts,
            "commands_s": {name: _summary(times) for name, times in self.commands.items()},
            "stages_s": {name: _summary(times) for name, times in self.stages.items()},
            "first_token_s": self.first_token_s,
        }

    def text(self) -> str:
        """As a table."""
        lines = [*machine.header(self.facts, {}), ""]
        lines += ["| | median | fastest | slowest |", "| --- | --- | --- | --- |"]
        for name, times in self.commands.items():
            lines.append(_row(f"`{name}`", times))
        taken = {name: times for name, times in self.stages.items() if any(times)}
        lines += [_row(TITLES[name], times) for name, times in taken.items()]
        lines.append(f"\nFirst token after {self.first_token_s:.2f} s.")
        return "\n".join(lines)


def measure(model: str | None, repeats: int) -> Startup:
    """Start commands again and again, after a first time that warms the disk's cache.

    Args:
        model: Folder or Hub repository; None for the embedded model.
        repeats: How often.

    Raises:
        UserError: If one of them fails.
    """
    with Worker(OURS) as worker:
        found = Startup(worker.ask("describe"))
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


def _timed(arguments: list[str]) -> tuple[float, str]:
    """Seconds that Python took for some arguments, and what it printed."""
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(arguments)} fails: {last.removeprefix('error: ')}")
    return seconds, result.stdout


def _summary(times: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(times), "low": min(times), "high": max(times)}


def _row(title: str, times: list[float]) -> str:
    cells = (statistics.median(times), min(times), max(times))
    return f"| {title} | {' | '.join(f'{seconds * 1e3:.0f} ms' for seconds in cells)} |"
