"""From a path to a checkpoint whose tensors can be read, whatever its format."""

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
    """A checkpoint that is ready to be read.

    Attributes:
        source: Where it came from: where its tokenizer is, and what it is called.
        folder: Its configuration and tensors.
        notes: What was found out by looking, one sentence each.
    """

    source: Source
    folder: CheckpointFolder
    notes: tuple[str, ...] = ()


@contextmanager
def open_checkpoint(
    path_or_repo: str | os.PathLike[str],
    revision: str | None,
    target: Path,
    unsaid: ConfigOverrides | None = None,
    *,
    progress: bool = False,
) -> Iterator[OpenCheckpoint]:
    """Find a checkpoint, see what format it has, and open it.

    Args:
        path_or_repo: A folder, a file or a Hub repository.
        revision: Branch, tag or commit of a repository.
        target: The folder that is going to be written; an archive is unpacked beside it, for as
            long as it is read.
        unsaid: What the user says of things that Google's formats do not hold.
        progress: Show a progress bar while an archive is unpacked.

    Raises:
        UserError: If `unsaid` says something of a checkpoint that says it itself.
        CheckpointError: If there is none, or it is damaged.
    """
    unsaid = unsaid or ConfigOverrides()
    source = locate(path_or_repo, revision)
    found = detect_format(source.folder)
    if found.kind is not CheckpointFormat.ARCHIVE:
        yield _open(found, source, unsaid)
        return
    with scratch_directory(target) as scratch:
        try:
            _unpack(found.path, scratch, progress)
            inside = detect_format(_only_folder(scratch))
            if inside.kind is CheckpointFormat.ARCHIVE:
                raise CheckpointError(f"{inside.path}: an archive in an archive.")
            name = found.path.name.split(".tar")[0].removesuffix(".tgz")
            yield _open(inside, Source(inside.path, title=name), unsaid)
        except UserError as error:
            # The unpacked files are gone by the time that the user reads this.
            raise type(error)(str(error).replace(str(scratch), str(found.path))) from error


def _unpack(archive: Path, scratch: Path, progress: bool) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    size = archive.stat().st_size
    with tqdm(total=size, desc="Unpacking", unit="B", unit_scale=True, disable=not progress) as bar:
        unpack(archive, scratch, bar.update)


def _only_folder(folder: Path) -> Path:
    """The folder itself, or, as long as a folder is all that it holds, that one."""
    while detect_format(folder).kind is CheckpointFormat.FOLDER:
        children = [path for path in folder.iterdir() if not path.name.startswith(".")]
        if len(children) != 1 or not children[0].is_dir():
            break
        folder = children[0]
    return folder


def _open(found: Detected, source: Source, unsaid: ConfigOverrides) -> OpenCheckpoint:
    if found.kind is CheckpointFormat.FOLDER:
        checkpoint = CheckpointFolder.open(found.path)
        if unsaid.stated:
            options = ", ".join(OPTION[name].split(" ")[0] for name in unsaid.stated)
            raise UserError(
                f"{options}: only for Google's formats; {found.path} has a config.json that says"
                " this itself."
            )
        return OpenCheckpoint(source, checkpoint)
    store = (
        TorchFile(found.path) if found.kind is CheckpointFormat.PYTORCH else OrbaxFolder(found.path)
    )
    checkpoint, released, said = open_google(store, unsaid)
    title = _title(found, source, released)
    notes = (f"This is {found.kind.value}.", said)
    return OpenCheckpoint(Source(_beside(found.path), title=title), checkpoint, notes)


def _beside(path: Path) -> Path:
    """The folder where a checkpoint's tokenizer is: its own, or the one that it lies in."""
    if path.is_dir() and (path / SENTENCEPIECE).is_file():
        return path
    return Path(os.path.abspath(path)).parent


def _title(found: Detected, source: Source, released: str | None) -> str:
    """What the model is called: Google's archives are called 2b, 2b-it and so on."""
    stem = found.path.resolve().name
    stem = stem.rpartition(".")[0] if found.kind is CheckpointFormat.PYTORCH else stem
    if released is None:
        return stem
    chat = any("it" in name.lower().replace("_", "-").split("-") for name in (stem, source.name))
    return f"recurrentgemma-{released}{'-it' if chat else ''}"
