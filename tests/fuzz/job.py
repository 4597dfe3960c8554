"""What a case consists of, and what came of it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

DIGEST_LIMIT = 64 << 20
"""Larger files are compared by size and time."""


class Box:
    """The folder of one case: `in` holds its files; the command runs in `cwd` and may use `tmp`."""

    def __init__(self, root: Path, sources: Path) -> None:
        self.root, self.sources = root, sources
        self.inputs, self.cwd, self.tmp = root / "in", root / "cwd", root / "tmp"
        self.out = root / "out"
        for folder in (root, self.inputs, self.cwd, self.tmp):
            folder.mkdir()

    def copy(self, name: str, target: str = "") -> Path:
        """Copy a sound source into the case; returns where it is."""
        source, place = self.sources / name, self.inputs / (target or Path(name).name)
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copyfile(source, place)
        return place

    def contents(self) -> dict[str, str]:
        """Return a digest of everything in the box, by its path."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            for name in [*folders, *files]:
                path = Path(folder, name)
                found[str(path.relative_to(self.root))] = _digest(path)
        return found


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_dir():
        return "folder"
    stat = path.stat()
    if not path.is_file() or stat.st_size > DIGEST_LIMIT:
        return f"{stat.st_mode} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@dataclass
class Job:
    """A command on files, made by a family.

    Attributes:
        command: Name of the command.
        argv: Its arguments.
        note: What is wrong with the case, for reports.
        target: Files or folders (relative to the box) that success may make or change; nothing else
            may be, and these not by a refusal.
        runs: Whether `target` is the folder of a training run, which stays once training began.
        stdin: Text for the command to read.
        interrupt: Whether the case may legitimately ask for much work: Ctrl-C ends it.
        until: Text on stdout upon which Ctrl-C ends the command.
        package: Where the command is.
    """

    command: str
    argv: list[str]
    note: str = ""
    target: tuple[str, ...] = ()
    runs: bool = False
    stdin: str = ""
    interrupt: bool = False
    until: str = ""
    package: str = "mlx_rgemma"


@dataclass(frozen=True)
class Failure:
    """What a case did that it must not.

    Attributes:
        kind: crash, hang, memory, traceback, message, left, escaped, writes, log, server,
            sound, accepted.
        detail: One or more lines.
    """

    kind: str
    detail: str


@dataclass(frozen=True)
class Result:
    """How a case ended: "accepted", "refused", or a failure."""

    verdict: str
    note: str = ""
    failure: Failure | None = None
    message: str = ""


Make = Callable[[Box, Random], Any]


@dataclass(frozen=True)
class Family:
    """A kind of input.

    Attributes:
        name: Lower case.
        target: "command", or "server": what the cases are for.
        sounds: Makers of undamaged cases, which must be accepted, by name.
        make: Makes a damaged case.
        payloads: Makers of cases by name: everything that was ever found.
        needs: Module without which the family is left out.
    """

    name: str
    target: str
    sounds: Mapping[str, Make]
    make: Make
    payloads: Mapping[str, Make] = field(default_factory=dict)
    needs: str = ""
