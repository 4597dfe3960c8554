"""What a path holds, found out by looking at it."""

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
"""A torch file of before 1.6: its magic number, pickled."""

ORBAX_FILES = ("_METADATA", "manifest.ocdbt", "_sharding")
TORCH_NAMES = ("*.pt", "*.pth", "*.ckpt")
ARCHIVE_NAMES = ("*.tar", "*.tar.gz", "*.tgz")
ARRAY = ".zarray"


class CheckpointFormat(Enum):
    """The formats that this package tells apart; the values are their names in messages."""

    FOLDER = "a folder in Hugging Face's layout"
    PYTORCH = "a checkpoint in Google's PyTorch format"
    FLAX = "a checkpoint in Google's Flax format"
    ARCHIVE = "an archive"


@dataclass(frozen=True)
class Detected:
    """What is there.

    Attributes:
        kind: Its format.
        path: The folder, the `.pt` file, the folder that Orbax wrote, or the archive.
    """

    kind: CheckpointFormat
    path: Path


def detect_format(path: Path) -> Detected:
    """Find out what a file or folder holds.

    A folder that is no checkpoint itself may hold one: a `.pt` file or an archive as it was
    downloaded, or the folder of a Flax checkpoint beside its tokenizer.

    Raises:
        CheckpointError: If there is nothing known, or more than one thing.
    """
    if path.is_file():
        return Detected(_kind_of_file(path), path)
    if not path.is_dir() or (path / CONFIG).exists():
        return Detected(CheckpointFormat.FOLDER, path)  # opening it says what is wrong
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
    """Say how to convert a checkpoint that cannot be loaded as it is.

    Raises:
        CheckpointError: If it is in one of Google's formats, or an archive.
    """
    found = detect_format(path)
    if found.kind is not CheckpointFormat.FOLDER:
        raise CheckpointError(
            f"{path}: {found.kind.value}; convert it first: mlx_rgemma.convert --hf-path {path}"
            " --mlx-path <new folder>."
        )


def _files(path: Path, names: Iterable[str]) -> list[Path]:
    """Files of some names, but for hidden ones (a Mac's archives hold a `._x` for each x)."""
    found = (file for name in names for file in path.glob(name))
    return [file for file in found if file.is_file() and not file.name.startswith(".")]


def _orbax_folders(path: Path) -> list[Path]:
    """Orbax folders in a folder, also those that a step or an item's name lies around."""
    found = []
    for child in sorted(path.iterdir()):
        with suppress(PermissionError):  # what cannot be looked at is not what was meant
            if not child.is_dir() or child.is_symlink():
                continue
            if _is_orbax(child):
                found.append(child)
            else:
                found += [p for p in sorted(child.iterdir()) if p.is_dir() and _is_orbax(p)]
    return found


def _is_orbax(path: Path) -> bool:
    """Whether a folder holds arrays that Orbax wrote."""
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
            f"{path}: a PyTorch file of before version 1.6, which only unpickling could read; load"
            " it with torch and save it again with torch.save."
        )
    if start.startswith(b"\x1f\x8b") or start[257:262] == b"ustar":
        return CheckpointFormat.ARCHIVE
    if start.startswith(b"PK"):
        return CheckpointFormat.PYTORCH if _is_torch_zip(path) else _refuse_zip(path)
    if path.suffix == ".tar":
        return CheckpointFormat.ARCHIVE
    if any(path.match(name) for name in TORCH_NAMES):
        return CheckpointFormat.PYTORCH  # damaged, which reading it says
    raise CheckpointError(
        f"{path}: a file of no known format; give the folder that holds the model, Google's .pt"
        " file, or a .tar.gz archive as it was downloaded."
    )


def _is_torch_zip(path: Path) -> bool:
    try:
        with open_zip(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # a damaged one, whatever zipfile makes of it
        return any(path.match(name) for name in TORCH_NAMES)


def _refuse_zip(path: Path) -> CheckpointFormat:
    raise CheckpointError(f"{path}: a zip archive; unpack it, and give the folder.")
