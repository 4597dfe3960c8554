"""Detection of a checkpoint's format from its files."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mlx_rgemma.checkpoints.formats.huggingface import CONFIG, WEIGHT_FILES
from mlx_rgemma.checkpoints.formats.pytorch import open_zip
from mlx_rgemma.errors import CheckpointError, shortened
from mlx_rgemma.io.reading import open_regular

LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""Beginning of a torch file from before 1.6: its magic number, pickled."""

ORBAX_FILES = ("_METADATA", "manifest.ocdbt", "_sharding")
TORCH_NAMES = ("*.pt", "*.pth", "*.ckpt")
ARCHIVE_NAMES = ("*.tar", "*.tar.gz", "*.tgz")
ARRAY = ".zarray"


class CheckpointFormat(Enum):
    """Formats of checkpoints; the values are their names in messages."""

    FOLDER = "a folder in Hugging Face's layout"
    PYTORCH = "a checkpoint in Google's PyTorch format"
    FLAX = "a checkpoint in Google's Flax format"
    ARCHIVE = "an archive"


@dataclass(frozen=True)
class Detected:
    """A detected checkpoint.

    Attributes:
        kind: Its format.
        path: The folder, `.pt` file, Orbax folder or archive.
    """

    kind: CheckpointFormat
    path: Path


def detect_format(path: Path) -> Detected:
    """Detect the format of a file or folder.

    A folder may contain the checkpoint: a downloaded `.pt` file or archive, or the folder of a Flax
    checkpoint beside its tokenizer.

    Raises:
        CheckpointError: If a file has an unknown format, or a folder several checkpoints.
    """
    if path.is_file():
        return Detected(_kind_of_file(path), path)
    if not path.is_dir() or (path / CONFIG).exists():
        return Detected(CheckpointFormat.FOLDER, path)  # opening it reports any problem
    if _is_orbax(path):
        return Detected(CheckpointFormat.FLAX, path)
    if any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
        return Detected(CheckpointFormat.FOLDER, path)
    inside = [
        *(Detected(CheckpointFormat.PYTORCH, p) for p in _files(path, TORCH_NAMES)),
        *(Detected(CheckpointFormat.FLAX, p) for p in _orbax_folders(path)),
    ] or [Detected(CheckpointFormat.ARCHIVE, p) for p in _files(path, ARCHIVE_NAMES)]
    if len(inside) > 1:
        names = shortened(sorted(str(found.path.relative_to(path)) for found in inside))
        raise CheckpointError(f"{path}: more than one checkpoint: {names}; name one of them.")
    if not inside:
        return Detected(CheckpointFormat.FOLDER, path)
    found = inside[0]
    return detect_format(found.path) if found.path.is_file() else found


def refuse_unconverted(path: Path) -> None:
    """Refuse a checkpoint that must be converted first.

    Raises:
        CheckpointError: If it is in one of Google's formats, or an archive; with the command.
    """
    found = detect_format(path)
    if found.kind is not CheckpointFormat.FOLDER:
        raise CheckpointError(
            f"{path}: {found.kind.value}; convert it first: mlx_rgemma.convert --hf-path {path}"
            " --mlx-path <new folder>."
        )


def _files(path: Path, names: Iterable[str]) -> list[Path]:
    """Return files by pattern, without hidden ones (archives of a Mac have a `._x` for each x)."""
    found = (file for name in names for file in path.glob(name))
    return [file for file in found if file.is_file() and not file.name.startswith(".")]


def _orbax_folders(path: Path) -> list[Path]:
    """Return the Orbax folders in a folder, also inside a step's or an item's folder."""
    found = []
    for child in sorted(path.iterdir()):
        with suppress(PermissionError):
            if not child.is_dir() or child.is_symlink():
                continue
            if _is_orbax(child):
                found.append(child)
            else:
                found += [p for p in sorted(child.iterdir()) if p.is_dir() and _is_orbax(p)]
    return found


def _is_orbax(path: Path) -> bool:
    """Return whether a folder holds Orbax arrays."""
    if any((path / name).is_file() for name in ORBAX_FILES):
        return True
    return next(path.glob(f"*/{ARRAY}"), None) is not None


def _kind_of_file(path: Path) -> CheckpointFormat:
    try:
        with open_regular(path) as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if start.startswith(LEGACY_TORCH):
        raise CheckpointError(
            f"{path}: a PyTorch file from before version 1.6, which only unpickling can read; load"
            " it with torch and save it again with torch.save."
        )
    if start.startswith(b"\x1f\x8b") or start[257:262] == b"ustar":
        return CheckpointFormat.ARCHIVE
    if start.startswith(b"PK"):
        return CheckpointFormat.PYTORCH if _is_torch_zip(path) else _refuse_zip(path)
    if path.suffix == ".tar":
        return CheckpointFormat.ARCHIVE
    if any(path.match(name) for name in TORCH_NAMES):
        return CheckpointFormat.PYTORCH  # damaged: reading it reports that
    raise CheckpointError(
        f"{path}: unknown format; give the folder of the model, Google's .pt file, or a downloaded"
        " .tar.gz archive."
    )


def _is_torch_zip(path: Path) -> bool:
    try:
        with open_zip(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # damaged: zipfile raises many types
        return any(path.match(name) for name in TORCH_NAMES)


def _refuse_zip(path: Path) -> CheckpointFormat:
    raise CheckpointError(f"{path}: a zip archive; unpack it, and give the folder.")
