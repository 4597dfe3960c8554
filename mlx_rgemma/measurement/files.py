"""Files of a benchmark: written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import UserError


def check_folder(path: Path | None) -> None:
    """Refuse a file that cannot be written, before anything slow is done.

    Raises:
        UserError: If its folder does not exist, or it is one itself.
    """
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder}.")
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected the name of a file.")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under another name beside it, and renamed."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
