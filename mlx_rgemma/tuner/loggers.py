"""Services that draw a run as it goes, through mlx-lm's callbacks: wandb and swanlab."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.trainer import TrainingCallback


def service_names(report_to: str | None) -> list[str]:
    """The services of a list with commas.

    Raises:
        UserError: If there is no such service, or it is not installed.
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
    """A run of each service, which ends with the block.

    Args:
        names: From `service_names`.
        log: Is told everything, too.
        project: What the services call it; None for their own name.
        settings: Of the run; its `adapter_path` is where the services keep their files.

    Yields:
        What is to be told how training goes.

    Raises:
        UserError: If a service cannot begin.
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
    except Exception as error:  # no login, no network: each service has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--report-to {','.join(names)}: cannot begin ({reason}).") from error
    innermost: Any = service
    while innermost.wrapped_callback is not None:
        innermost = innermost.wrapped_callback
    innermost.wrapped_callback = log
    try:
        yield service
    finally:
        for name in names:
            getattr(callbacks, name).finish()
