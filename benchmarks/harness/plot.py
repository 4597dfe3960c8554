"""Pictures of a benchmark; they need the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Result
from mlx_rgemma.errors import UserError
from mlx_rgemma.io.atomic import atomic_file

FORMATS = (".svg", ".png", ".pdf")

PANELS = {
    "prompt_tps": ("prompt tokens/s", "tokens of the prompt"),
    "generation_tps": ("generated tokens/s", "tokens read before"),
    "training_tps": ("training tokens/s", "tokens per sequence"),
}


def check(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before the measurement.

    Raises:
        UserError: If matplotlib is missing, or the file has no known suffix.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: a picture is one of {', '.join(FORMATS)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install '.[plot]' in a clone.") from error


def plot(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draw every speed against length, one line per engine, dtype, quantization and batch size."""
    figures = [name for name in PANELS if any(getattr(r, name) is not None for r in results)]
    figure, panels = panels_of(len(figures), title)
    for panel, name in zip(panels, figures, strict=True):
        lines: dict[str, list[Result]] = {}
        for result in results:
            if getattr(result, name) is not None:
                lines.setdefault(_label(result, results), []).append(result)
        for label, points in lines.items():
            points.sort(key=lambda r: r.case.length)
            spreads = [getattr(point, name) for point in points]
            lengths = [point.case.length for point in points]
            panel.plot(lengths, [s.median for s in spreads], marker="o", label=label)
            panel.fill_between(
                lengths, [s.low for s in spreads], [s.high for s in spreads], alpha=0.2
            )
        heading, axis = PANELS[name]
        finish_panel(panel, heading, axis)
    save(figure, path)


def panels_of(count: int, title: str) -> tuple[Any, list[Any]]:
    """Return a figure with panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "mlx_rgemma"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, count, figsize=(4.6 * count, 3.6), squeeze=False)
    figure.suptitle(title, fontsize=9)
    return figure, list(panels[0])


def finish_panel(panel: Any, heading: str, axis: str) -> None:
    """Add titles, a logarithmic axis of tokens, and speeds from 0."""
    panel.set_title(heading, fontsize=10)
    panel.set_xlabel(axis)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.tick_params(axis="x", labelrotation=30)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def save(figure: Any, path: Path) -> None:
    """Write a figure atomically."""
    figure.tight_layout()
    how = {"format": path.suffix[1:], "dpi": 120, "metadata": _no_date(path)}
    with atomic_file(path) as partial:
        figure.savefig(partial, **how)


def _no_date(path: Path) -> dict[str, Any]:
    return (
        {} if path.suffix == ".png" else {"Date" if path.suffix == ".svg" else "CreationDate": None}
    )


def _label(result: Result, results: Sequence[Result]) -> str:
    """Return the properties in which a line differs from others."""
    words = [result.engine]
    if len({r.dtype for r in results}) > 1:
        words.append(result.dtype)
    if len({r.quantization for r in results}) > 1:
        words.append(f"quantization {result.quantization}")
    if len({r.case.batch_size for r in results}) > 1:
        words.append(f"batch {result.case.batch_size}")
    return ", ".join(words)
