"""Results: speeds with their spread, and ratios between engines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.harness.engines import OURS
from benchmarks.harness.plan import Case


@dataclass(frozen=True)
class Spread:
    """The values of one figure."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"median": self.median, "low": self.low, "high": self.high, "values": self.values}


@dataclass
class Result:
    """All trials of one case by one engine.

    Attributes:
        engine: Name of the engine.
        dtype, quantization: Of the model, as it was loaded.
        case: The case.
        weight_bytes: Bytes of the weights.
        read_bytes: Bytes of weights that a decode step reads.
        trials: The worker's answers.
        bandwidth: Bytes per second of a copy, measured between the trials.
        launches: Launches of a decode step on a Mac's GPU; None if not counted.
    """

    engine: str
    dtype: str
    quantization: str
    case: Case
    weight_bytes: int
    read_bytes: int
    trials: list[dict[str, Any]] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    launches: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what results of different engines must share to be compared."""
        return (self.dtype, self.quantization, self.case)

    def _spread(self, figure: Callable[[dict[str, Any]], float | None]) -> Spread | None:
        values = [value for value in map(figure, self.trials) if value is not None]
        return Spread(tuple(values)) if values else None

    @property
    def prompt_tps(self) -> Spread | None:
        """Return the prompt tokens per second, of all sequences, until the first token."""
        if self.case.kind != "generate":
            return None
        tokens = self.case.length * self.case.batch_size
        return self._spread(lambda trial: tokens / trial["first_token_s"])

    @property
    def first_token_s(self) -> Spread | None:
        """Return the seconds to the first token."""
        if self.case.kind != "generate":
            return None
        return self._spread(lambda trial: trial["first_token_s"])

    @property
    def generation_tps(self) -> Spread | None:
        """Return the tokens per second from the first to the last, of all sequences."""
        if self.case.kind == "train":
            return None
        return self._spread(self._generation_tps)

    def _generation_tps(self, trial: dict[str, Any]) -> float | None:
        steps = trial["tokens"] - 1
        seconds = trial["last_token_s"] - trial["first_token_s"]
        return self.case.batch_size * steps / seconds if steps > 0 and seconds > 0 else None

    @property
    def training_tps(self) -> Spread | None:
        """Return the training tokens per second."""
        if self.case.kind != "train":
            return None
        tokens = self.case.length * self.case.batch_size
        return self._spread(lambda trial: tokens / trial["step_s"])

    @property
    def peak_memory_bytes(self) -> int | None:
        """Return the allocator's peak, or the process's if the engine has none."""
        key = "peak_memory_bytes"
        if any(trial[key] is None for trial in self.trials):
            key = "process_peak_bytes"
        return max((trial[key] for trial in self.trials), default=None)

    @property
    def state_bytes(self) -> int | None:
        """Return the bytes kept between two tokens, for all sequences."""
        found = [trial["state_bytes"] for trial in self.trials if "state_bytes" in trial]
        return max(found, default=None)

    @property
    def bytes_per_step(self) -> int | None:
        """Return the bytes that a decode step reads: all weights, and all states."""
        return None if self.state_bytes is None else self.read_bytes + self.state_bytes

    @property
    def bandwidth_share(self) -> float | None:
        """Return the bytes per second that decoding reads, relative to a copy."""
        speed, step = self.generation_tps, self.bytes_per_step
        if speed is None or step is None or not self.bandwidth:
            return None
        copy = statistics.median(self.bandwidth)
        return speed.median / self.case.batch_size * step / copy

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        process = [trial["process_peak_bytes"] for trial in self.trials]
        spreads = {name: getattr(self, name) for name in SPREADS}
        return {
            "engine": self.engine,
            "dtype": self.dtype,
            "quantization": self.quantization,
            **asdict(self.case),
            **{name: s and s.as_dict() for name, s in spreads.items()},
            "peak_memory_gb": _gigabytes(self.peak_memory_bytes),
            "process_peak_gb": _gigabytes(max(process, default=None)),
            "state_bytes": self.state_bytes,
            "weight_bytes": self.weight_bytes,
            "bytes_per_step": self.bytes_per_step,
            "bandwidth_share": self.bandwidth_share,
            "launches_per_step": self.launches,
        }


SPEEDS = ("prompt_tps", "generation_tps", "training_tps")
SPREADS = (*SPEEDS, "first_token_s")


@dataclass(frozen=True)
class Ratio:
    """Speed of this package relative to a baseline, by the medians."""

    figure: str
    baseline: str
    dtype: str
    quantization: str
    case: Case
    ratio: float


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """Return this package's speeds relative to each baseline's."""
    ours = {result.key: result for result in results if result.engine == OURS}
    found = []
    for result in results:
        if result.engine == OURS or result.key not in ours:
            continue
        for figure in SPEEDS:
            mine, theirs = getattr(ours[result.key], figure), getattr(result, figure)
            if mine is not None and theirs is not None:
                found.append(
                    Ratio(
                        figure=figure,
                        baseline=result.engine,
                        dtype=result.dtype,
                        quantization=result.quantization,
                        case=result.case,
                        ratio=mine.median / theirs.median,
                    )
                )
    return found


@dataclass(frozen=True)
class Flatness:
    """A speed at the greatest length relative to that at the smallest: 1 is flat."""

    figure: str
    engine: str
    dtype: str
    quantization: str
    batch_size: int
    short: int
    long: int
    ratio: float


def flatness(results: Sequence[Result]) -> list[Flatness]:
    """Return the cost of length: of prompts, and of generation after a text."""
    figures = {"generate": "prompt_tps", "after": "generation_tps"}
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for r in results:
        if r.case.kind in figures and r.trials:
            key = (r.case.kind, r.engine, r.dtype, r.quantization, r.case.batch_size)
            groups.setdefault(key, []).append(r)
    found = []
    for group in groups.values():
        group.sort(key=lambda r: r.case.length)
        short, long = group[0], group[-1]
        figure = figures[short.case.kind]
        first, last = getattr(short, figure), getattr(long, figure)
        if short.case.length < long.case.length and first is not None and last is not None:
            found.append(
                Flatness(
                    figure=figure,
                    engine=short.engine,
                    dtype=short.dtype,
                    quantization=short.quantization,
                    batch_size=short.case.batch_size,
                    short=short.case.length,
                    long=long.case.length,
                    ratio=last.median / first.median,
                )
            )
    return found


def _gigabytes(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 1e9
