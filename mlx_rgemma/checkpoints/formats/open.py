"""Opening a checkpoint of any format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_rgemma.checkpoints.formats.archive import unpack
from mlx_rgemma.checkpoints.formats.detect import CheckpointFormat, Detected, detect_format
from mlx_rgemma.checkpoints.formats.google import OPTION, ConfigOverrides, open_google
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.formats.orbax import OrbaxFolder
from mlx_rgemma.checkpoints.formats.pytorch import TorchFile
from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.io.atomic import scratch_directory
from mlx_rgemma.io.hub import Source, locate
from mlx_rgemma.tokenizers.load import SENTENCEPIECE


@dataclass(frozen=True)
class OpenCheckpoint:
    """An open checkpoint.

    Attributes:
        source: Folder of its tokenizer, and its name.
        folder: Its configuration and tensors.
        notes: Notes on the detected format, one sentence each.
    """

    source: Source
    folder: CheckpointFolder
    notes: tuple[str, ...] = ()


@contextmanager
def open_checkpoint(
    path_or_repo: str | os.PathLike[str],
    revision: str | None,
    target: Path,
    overrides: ConfigOverrides | None = None,
    *,
    progress: bool = False,
) -> Iterator[OpenCheckpoint]:
    """Locate a checkpoint, detect its format, and open it.

    Args:
        path_or_repo: A folder, a file or a Hub repository.
        revision: Branch, tag or commit of a repository.
        target: The folder that will be written; archives are unpacked in its parent folder.
        overrides: Settings that are missing in Google's formats.
        progress: Show a progress bar while an archive is unpacked.

    Raises:
        UserError: If `overrides` are given for a format that has these settings.
        CheckpointError: If there is no checkpoint, or it is damaged.
    """
    overrides = overrides or ConfigOverrides()
    source = locate(path_or_repo, revision)
    found = detect_format(source.folder)
    if found.kind is not CheckpointFormat.ARCHIVE:
        yield _open(found, source, overrides)
        return
    with scratch_directory(target) as scratch:
        try:
            _unpack(found.path, scratch, progress)
            inside = detect_format(_only_folder(scratch))
            if inside.kind is CheckpointFormat.ARCHIVE:
                raise CheckpointError(f"{inside.path}: an archive in an archive.")
            name = found.path.name.split(".tar")[0].removesuffix(".tgz")
            yield _open(inside, Source(inside.path, title=name), overrides)
        except UserError as error:
            # Name the archive: the unpacked files are temporary.
            raise type(error)(str(error).replace(str(scratch), str(found.path))) from error


def _unpack(archive: Path, scratch: Path, progress: bool) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    size = archive.stat().st_size
    with tqdm(total=size, desc="Unpacking", unit="B", unit_scale=True, disable=not progress) as bar:
        unpack(archive, scratch, bar.update)


def _only_folder(folder: Path) -> Path:
    """Descend while a folder holds nothing but one other folder."""
    while detect_format(folder).kind is CheckpointFormat.FOLDER:
        children = [path for path in folder.iterdir() if not path.name.startswith(".")]
        if len(children) != 1 or not children[0].is_dir():
            break
        folder = children[0]
    return folder


def _open(found: Detected, source: Source, overrides: ConfigOverrides) -> OpenCheckpoint:
    if found.kind is CheckpointFormat.FOLDER:
        checkpoint = CheckpointFolder.open(found.path)
        if overrides.provided:
            options = ", ".join(OPTION[name].split(" ")[0] for name in overrides.provided)
            raise UserError(
                f"{options}: only for Google's formats; {found.path} has a config.json, leave the"
                " options out."
            )
        return OpenCheckpoint(source, checkpoint)
    store = (
        TorchFile(found.path) if found.kind is CheckpointFormat.PYTORCH else OrbaxFolder(found.path)
    )
    checkpoint, released, note = open_google(store, overrides)
    title = _title(found, source, released)
    notes = (f"This is {found.kind.value}.", note)
    return OpenCheckpoint(Source(_tokenizer_folder(found.path), title=title), checkpoint, notes)


def _tokenizer_folder(path: Path) -> Path:
    """Return the folder of a checkpoint's tokenizer: its own, or its parent."""
    if path.is_dir() and (path / SENTENCEPIECE).is_file():
        return path
    return Path(os.path.abspath(path)).parent


def _title(found: Detected, source: Source, released: str | None) -> str:
    """Return the name of a model: Google's archives are named 2b, 2b-it and so on."""
    stem = found.path.resolve().name
    stem = stem.rpartition(".")[0] if found.kind is CheckpointFormat.PYTORCH else stem
    if released is None:
        return stem
    chat = any("it" in name.lower().replace("_", "-").split("-") for name in (stem, source.name))
    return f"recurrentgemma-{released}{'-it' if chat else ''}"
