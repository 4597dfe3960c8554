"""Reports of training: lines on the terminal, a log of JSON lines, a plot, wandb and swanlab."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.atomic import atomic_file
from mlx_rgemma.io.reading import is_integer, is_number, parse_object, read_lines, reason
from mlx_rgemma.tuner.trainer import TrainingCallback


def train_line(info: dict[str, Any], iters: int | None = None) -> str:
    """Format a training report like mlx-lm, with the time left of `iters` iterations."""
    speed = info["iterations_per_second"]
    line = (
        f"Iter {info['iteration']}: Train loss {info['train_loss']:.3f},"
        f" Learning Rate {info['learning_rate']:.3e},"
        f" It/sec {speed:.3f},"
        f" Tokens/sec {info['tokens_per_second']:.3f},"
        f" Trained Tokens {info['trained_tokens']},"
        f" Peak mem {info['peak_memory']:.3f} GB"
    )
    left = 0 if iters is None else iters - info["iteration"]
    return f"{line}, {duration(left / speed)} left" if left > 0 and speed > 0 else line


def duration(seconds: float) -> str:
    """Format a duration in about two digits."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def val_line(info: dict[str, Any]) -> str:
    """Format the result of an evaluation like mlx-lm, with more figures."""
    line = f"Iter {info['iteration']}: Val loss {info['val_loss']:.3f}"
    if "val_bits_per_byte" in info:
        line += f", Val bits/byte {info['val_bits_per_byte']:.4f}"
    line += f", Val took {info['val_time']:.3f}s"
    if "sample" in info:
        line += "\n  Sample: " + " ".join(info["sample"].split())
    return line


class ProgressLog(TrainingCallback):
    """Prints reports and appends each to a file as a line of JSON.

    Lines of iterations that a resumed run will repeat are removed first, so that the file is that
    of an uninterrupted run.

    Args:
        path: The file; None for none.
        done: Completed iterations.
        iters: Iterations of the whole run, if known.
        show: Prints a line.
    """

    def __init__(
        self,
        path: Path | None,
        done: int,
        iters: int | None = None,
        show: Callable[[str], None] = print,
    ) -> None:
        self.path, self.iters, self.show = path, iters, show
        if path is not None and path.exists():
            kept = [line for line in read_log(path) if done and line["iteration"] <= done]
            with atomic_file(path) as partial:
                text = "".join(json.dumps(line) + "\n" for line in kept)
                partial.write_text(text, encoding="utf-8")

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._add(train_info, train_line(train_info, self.iters))

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self._add(val_info, val_line(val_info))

    def _add(self, info: dict[str, Any], line: str) -> None:
        self.show(line)
        if self.path is not None:
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in info.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the reports of a log; a last line truncated by a kill is skipped.

    Raises:
        UserError: If the file is missing or not a log.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; training writes it.")
    found: list[dict[str, Any]] = []
    broken = 0
    for number, text in read_lines(path):
        if broken:
            raise UserError(f"{path}: line {broken} is not a training report.")
        try:
            line = parse_object(f"{path}: line {number}", text)
        except UserError:
            line = {}
        if is_integer(line.get("iteration"), 0, 1 << 60):
            found.append(line)
        else:
            broken = number
    return found


def check_plot(target: Path) -> None:
    """Check before training that a plot can be drawn at its end.

    Raises:
        UserError: If matplotlib is not installed or does not support the file type, or the folder
            does not exist.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install '.[plot]' in a clone.") from error
    known = sorted(Figure().canvas.get_supported_filetypes())
    if target.suffix[1:].lower() not in known:
        raise UserError(f"--plot {target}: not an image file ({', '.join(known)}).")
    if not target.parent.is_dir():
        raise UserError(f"--plot {target}: there is no folder {target.parent}.")


def plot_log(log: Path, target: Path) -> None:
    """Plot the losses and the learning rate of a log.

    Args:
        log: File of a `ProgressLog`.
        target: The image file; its suffix is the file type.

    Raises:
        UserError: If the log has no reports, or for a reason of `check_plot`.
    """
    check_plot(target)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(log)
    trained = _with_numbers(lines, "train_loss", "learning_rate")
    measured = _with_numbers(lines, "val_loss")
    if not trained:
        raise UserError(f"{log}: has no reports to plot.")
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    at = [line["iteration"] for line in trained]
    axes.plot(at, [line["train_loss"] for line in trained], lw=1, label="training")
    if measured:
        points = [(line["iteration"], line["val_loss"]) for line in measured]
        axes.plot(*zip(*points, strict=True), "o-", ms=3, label="validation")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss, nats per token")
    axes.legend(loc="upper right")
    rate = axes.twinx()
    rate.plot(at, [line["learning_rate"] for line in trained], color="0.7", lw=1)
    rate.set_ylabel("learning rate", color="0.5")
    try:
        with atomic_file(target) as partial:
            figure.savefig(partial)
    finally:
        plt.close(figure)


def _with_numbers(lines: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Return the reports that have a number under each key."""
    return [line for line in lines if all(is_number(line.get(k), -1e30, 1e30) for k in keys)]


def service_names(report_to: str | None) -> list[str]:
    """Parse a comma-separated list of services (wandb, swanlab).

    Raises:
        UserError: If a service is unknown or not installed.
    """
    from mlx_lm.tuner import callbacks

    names = [name.strip().lower() for name in (report_to or "").split(",") if name.strip()]
    for name in names:
        if name not in callbacks.SUPPORT_CALLBACK:
            known = ", ".join(callbacks.SUPPORT_CALLBACK)
            raise UserError(f"--report-to: found {name!r}, expected {known}.")
        if getattr(callbacks, name) is None:
            raise UserError(f"--report-to: {name} is not installed: pip install {name}.")
    return names


@contextmanager
def reporting(
    names: list[str], log: TrainingCallback, project: str | None, settings: Mapping[str, Any]
) -> Iterator[TrainingCallback]:
    """Start a run of each service, and end it with the block.

    Args:
        names: From `service_names`.
        log: Another receiver of all reports.
        project: Project name; None for the services' default.
        settings: Settings of the run; the services keep their files in its `adapter_path`.

    Yields:
        The receiver of reports.

    Raises:
        UserError: If a service cannot start.
    """
    if not names:
        yield log
        return
    from mlx_lm.tuner import callbacks

    folder = Path(settings["adapter_path"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        service = callbacks.get_reporting_callbacks(
            ",".join(names),
            project_name=project,
            log_dir=str(folder),
            config=dict(settings),  # type: ignore[arg-type]
        )
    except Exception as error:  # no login, no network: the types differ by service
        raise UserError(
            f"--report-to {','.join(names)}: cannot begin ({reason(error)})."
        ) from error
    innermost: Any = service
    while innermost.wrapped_callback is not None:
        innermost = innermost.wrapped_callback
    innermost.wrapped_callback = log
    try:
        yield service
    finally:
        for name in names:
            getattr(callbacks, name).finish()
