"""Locating a checkpoint: a folder, a repository of the Hugging Face Hub, or the embedded model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_rgemma.errors import CheckpointError, shown
from mlx_rgemma.io.reading import reason

EMBEDDED = Path(__file__).parent.parent / "assets" / "embedded"
"""The small model of this package."""

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

MAX_PATH = 4096

PATTERNS = ["*.json", "model*.safetensors", "weights*.safetensors", "tokenizer.model", "*.jinja"]
"""Files that are downloaded: those of mlx-lm, without code."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
        folder: Its folder.
        repository: Its repository on the Hub, if it was downloaded.
        title: Name of the model, if neither of these is its name.
    """

    folder: Path
    repository: str | None = None
    title: str | None = None

    @property
    def name(self) -> str:
        """Name of the model: its title, or that of its repository or folder."""
        if self.title is not None:
            return self.title
        return (self.repository or str(self.folder.resolve())).rpartition("/")[2]


def locate(path_or_repo: str | os.PathLike[str] | None, revision: str | None = None) -> Source:
    """Locate a checkpoint; a repository that is not cached is downloaded.

    Args:
        path_or_repo: A folder, a Hub repository (`owner/name`), or None for the embedded model.
        revision: Branch, tag or commit of a repository.

    Raises:
        CheckpointError: If there is no such folder or repository, it is gated, or the Hub cannot
            be reached.
    """
    if path_or_repo is None:
        return Source(EMBEDDED)
    if not os.fspath(path_or_repo):
        raise CheckpointError("the path of the model is empty.")
    if len(os.fspath(path_or_repo)) > MAX_PATH:
        raise CheckpointError(f"model is {shown(path_or_repo)}, longer than a path can be.")
    folder = Path(path_or_repo).expanduser()
    if os.path.lexists(folder):
        return Source(folder)
    if isinstance(path_or_repo, str) and REPOSITORY.fullmatch(path_or_repo):
        return Source(_download(path_or_repo, revision), path_or_repo)
    raise CheckpointError(
        f"{folder}: no such folder (a repository of the Hugging Face Hub is written owner/name)."
    )


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=PATTERNS))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: its licence must be accepted first: open"
            f" https://huggingface.co/{repository}, accept, then log in with 'hf auth login'."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository}: has no revision {shown(revision)}.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: neither a folder here nor a repository of the Hugging Face Hub that"
            " you may see; if it is private, log in with 'hf auth login'."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: neither a folder here nor downloaded already, and the Hugging Face Hub"
            " cannot be reached; connect to the network, or give a folder."
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{repository}: {reason(error)}") from error
    except Exception as error:  # network errors of many types
        raise CheckpointError(f"{repository}: cannot be downloaded ({reason(error)}).") from error
