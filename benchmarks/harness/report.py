"""The printed report: mlx-lm's lines during the run, tables and ratios at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness.engines import TRANSFORMERS
from benchmarks.harness.results import (
    SPEEDS,
    Flatness,
    Ratio,
    Result,
    Spread,
    flatness,
    ratios,
)
from benchmarks.harness.runs import Report
from mlx_rgemma.evaluation import machine
from mlx_rgemma.evaluation.random_model import UNQUANTIZED
from mlx_rgemma.io.markdown import markdown_table

TITLES = {"prompt_tps": "prompt", "generation_tps": "generation", "training_tps": "training"}


def opening(report: Report) -> str:
    """Return the machine, the packages, the model and the cases."""
    plan = report.plan
    lines = machine.header(report.facts)
    for name, baseline in report.baselines.items():
        packages = " ".join(f"{package} {found}" for package, found in baseline["packages"].items())
        lines.append(f"Compared with {name}: {packages}; matrix products: {baseline['products']}")
    lines.append(f"\nModel: {report.name}, {report.parameters / 1e6:,.1f} million parameters")
    for cases, _ in plan.rounds():
        for case in cases:
            lengths = f"{case.kind}_tokens" if case.kind != "generate" else "prompt_tokens"
            generated = (
                "" if case.kind == "train" else (f"generation_tokens={plan.generation_tokens}, ")
            )
            lines.append(
                f"Timing with {lengths}={case.length}, {generated}batch_size={case.batch_size}."
            )
    return "\n".join(lines)


def trial(report: Report, result: Result) -> str:
    """Return the line of the latest trial, as mlx-lm's benchmark prints it."""
    latest = result.trials[-1]
    values = []
    for name in SPEEDS:
        spread: Spread | None = getattr(result, name)
        if spread is not None:
            values.append(f"{name}={spread.values[-1]:.3f}")
    peak = latest["peak_memory_bytes"] or latest["process_peak_bytes"]
    values.append(f"peak_memory={peak / 1e9:.3f}")
    values.append(f"total_time={latest.get('last_token_s', latest.get('step_s')):.3f}")
    return f"Trial {len(result.trials)}:  {_what(report, result)}{', '.join(values)}"


def _what(report: Report, result: Result) -> str:
    """Return the engine and the case of a line, where there are several."""
    words = []
    if report.plan.baselines:
        words.append(result.engine)
    if len(report.plan.dtypes) > 1:
        words.append(result.dtype)
    if len(report.plan.quantizations) > 1:
        words.append(f"quantization {result.quantization}")
    if sum(len(cases) for cases, _ in report.plan.rounds()) > 1:
        words.append(result.case.title)
    return f"{', '.join(words)}: " if words else ""


def closing(report: Report) -> str:
    """Return the medians as tables, the ratios, and the notes."""
    results = report.results
    parts = [_speeds([r for r in results if r.case.kind == "generate"])]
    parts.append(_after([r for r in results if r.case.kind == "after"]))
    parts.append(_training([r for r in results if r.case.kind == "train"], report.plan.training))
    parts.append(_ratios(report))
    copies = [speed for result in results for speed in result.bandwidth]
    if copies:
        middle = statistics.median(copies)
        parts.append(f"A copy of a large array reads and writes {middle / 1e9:.1f} GB/s here.")
    parts.append("\n".join(map(flatness_line, flatness(results))))
    if TRANSFORMERS in {result.engine for result in results}:
        parts.append("Note: the peak memory of transformers is that of its process.")
    parts.append("\n".join(f"Note: {note}" for note in report.notes))
    return "\n\n".join(part for part in parts if part)


def _ratios(report: Report) -> str:
    """Return the speed relative to each baseline as a table."""
    found = ratios(report.results)
    lines: dict[tuple[Any, ...], dict[str, Ratio]] = {}
    for ratio in found:
        key = (ratio.figure, ratio.dtype, ratio.quantization, ratio.case)
        lines.setdefault(key, {})[ratio.baseline] = ratio
    baselines = list(dict.fromkeys(ratio.baseline for ratio in found))
    table = [
        [
            _compared(next(iter(line.values()))),
            *(_times(line.get(baseline)) for baseline in baselines),
        ]
        for line in lines.values()
    ]
    return _table([["speed relative to", *baselines], *table])


def _compared(ratio: Ratio) -> str:
    case = ratio.case
    title = case.title
    if ratio.figure == "generation_tps" and case.kind == "generate":
        title = f"generation after {case.title}"
    loaded = "" if ratio.quantization == UNQUANTIZED else f", quantization {ratio.quantization}"
    return f"{title}, {ratio.dtype}{loaded}"


def _times(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.ratio:.2f}"


def flatness_line(found: Flatness) -> str:
    """Return the cost of length in words."""
    engine = f"{found.engine}, {found.dtype}, quantization {found.quantization}"
    batch = f", batch {found.batch_size}" if found.batch_size > 1 else ""
    return (
        f"{engine}{batch}: {TITLES[found.figure]} at {found.long:,} tokens runs at"
        f" {found.ratio:.3f} of its speed at {found.short:,}"
    )


Column = tuple[str, Callable[[Result], str]]

COMMON: tuple[Column, ...] = (
    ("engine", lambda r: r.engine),
    ("dtype", lambda r: r.dtype),
    ("quantization", lambda r: r.quantization),
    ("batch", lambda r: str(r.case.batch_size)),
)

ALIKE = {"quantization": UNQUANTIZED, "batch": "1"}
"""Columns that are left out if all their cells have this value."""

LIMITS: tuple[Column, ...] = (
    ("of the bandwidth", lambda r: _percent(r.bandwidth_share)),
    ("peak memory", lambda r: _bytes(r.peak_memory_bytes)),
    ("state", lambda r: _bytes(r.state_bytes)),
    ("launches per token", lambda r: "" if r.launches is None else str(r.launches)),
)


def _speeds(results: Sequence[Result]) -> str:
    return _columns(
        results,
        *COMMON,
        ("prompt", lambda r: f"{r.case.length:,}"),
        ("prompt tokens/s", lambda r: _spread(r.prompt_tps)),
        ("first token", lambda r: _seconds(r.first_token_s)),
        ("generation tokens/s", lambda r: _spread(r.generation_tps)),
        *LIMITS,
    )


def _after(results: Sequence[Result]) -> str:
    return _columns(
        results,
        *COMMON,
        ("tokens read", lambda r: f"{r.case.length:,}"),
        ("generation tokens/s", lambda r: _spread(r.generation_tps)),
        *LIMITS,
    )


def _training(results: Sequence[Result], training: str) -> str:
    return _columns(
        results,
        *COMMON,
        ("sequence", lambda r: f"{r.case.length:,}"),
        (f"training tokens/s ({training})", lambda r: _spread(r.training_tps)),
        ("peak memory", lambda r: _bytes(r.peak_memory_bytes)),
    )


def _columns(results: Sequence[Result], *columns: Column) -> str:
    """Return a table without the columns whose cells are all default."""
    cells = {title: [cell(result) for result in results] for title, cell in columns}
    telling = {t: c for t, c in cells.items() if set(c) - {ALIKE.get(t, "")}}
    return _table([list(telling), *map(list, zip(*telling.values(), strict=True))])


def _table(lines: list[list[str]]) -> str:
    """Return a table in Markdown, the first line its titles; nothing if it has no other."""
    return markdown_table(lines[0], lines[1:]) if len(lines) > 1 else ""


def _spread(figure: Spread | None) -> str:
    if figure is None:
        return ""
    digits = 0 if figure.median >= 100 else 1
    if len(figure.values) == 1:
        return f"{figure.median:,.{digits}f}"
    low, high = (f"{value:,.{digits}f}" for value in (figure.low, figure.high))
    return f"{figure.median:,.{digits}f} ({low} to {high})"


def _seconds(figure: Spread | None) -> str:
    if figure is None:
        return ""
    return f"{figure.median:.2f} s" if figure.median >= 1 else f"{figure.median * 1e3:.0f} ms"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _bytes(nbytes: Any) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
