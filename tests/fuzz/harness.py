"""Runs the cases of a family, each in a folder of its own, and collects what failed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from fuzz.commands import CommandTarget
from fuzz.families import FAMILIES
from fuzz.job import Box, Failure, Family, Job, Result
from fuzz.payloads import ACCEPTED
from fuzz.serving import ServerTarget


@dataclass(frozen=True)
class Report:
    """One case and how it ended."""

    family: str
    case: int | str
    seed: int
    result: Result

    def __str__(self) -> str:
        failure = self.result.failure
        what = f"{failure.kind}: {failure.detail}" if failure else self.result.message
        return f"{self.family}:{self.case} (seed {self.seed}) {self.result.note}\n    {what}"


class Harness:
    """Runs cases.

    Args:
        sources: Folder of the sound files.
        seed: Seed of everything.
        save: Folder for the files of failing cases.
    """

    def __init__(self, sources: Path, seed: int, save: Path | None = None) -> None:
        self.sources, self.seed, self.save = sources, seed, save
        self._targets = {"command": CommandTarget(sources), "server": ServerTarget(sources)}
        self._scratch = TemporaryDirectory(prefix="fuzz-")

    def close(self) -> None:
        """End all child processes."""
        for target in self._targets.values():
            target.close()
        self._scratch.cleanup()

    def run(self, family: Family, cases: Iterable[int | str]) -> Iterator[Report]:
        """Run cases of a family: numbers, or names of sound ones and payloads."""
        for case in cases:
            yield Report(family.name, case, self.seed, self._run(family, case))

    def _run(self, family: Family, case: int | str) -> Result:
        """Run a case; one that took too long is run again, since a pause of the machine may count.

        What does not end does not end the second time either.
        """
        result = self._run_once(family, case)
        if result.failure is not None and result.failure.kind == "hang":
            result = self._run_once(family, case)
        return result

    def _run_once(self, family: Family, case: int | str) -> Result:
        rng = Random(f"{self.seed} {family.name} {case}")
        named = {**family.sounds, **family.payloads}
        make = family.make if isinstance(case, int) else named[case]
        place = Path(self._scratch.name) / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        box = Box(place / "box", self.sources)
        job = make(box, rng)
        with self._kept(family, case, box, job) as keep:
            result = self._targets[family.target].run(job, box, sound=case in family.sounds)
            if result.verdict == "accepted" and self._must_be_refused(family, case):
                failure = Failure("accepted", "a payload that must be refused is accepted")
                result = Result("failed", result.note, failure)
            if result.failure is not None:
                keep()
        return result

    @staticmethod
    def _must_be_refused(family: Family, case: int | str) -> bool:
        return case in family.payloads and f"{family.name}:{case}" not in ACCEPTED

    @contextmanager
    def _kept(self, family: Family, case: int | str, box: Box, job: object) -> Iterator[object]:
        """Keep a copy of the case as it was before it ran, if it failed."""
        if self.save is None:
            yield lambda: None
            return
        copy = Path(self._scratch.name) / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(box.inputs, copy, symlinks=True, copy_function=_copy)
        if isinstance(job, Job):
            text = json.dumps({"command": job.command, "argv": job.argv, "stdin": job.stdin})
            (copy / "command.json").write_text(text)
        else:
            (copy / "request").write_bytes(job.raw)  # type: ignore[attr-defined]

        def keep() -> None:
            target = Path(self.save or "", f"{family.name}-{case}".replace("/", "_"))
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(copy, target)

        yield keep


def _copy(source: str, target: str) -> None:
    path = Path(source)
    if path.is_file() and path.stat().st_size < 100_000_000:
        shutil.copyfile(source, target)


GROUPS = {
    "models": ("safetensors", "config", "index", "adapters", "state"),
    "tokenizers": ("tokenizer", "sentencepiece", "template"),
    "archives": ("torch", "tar", "orbax"),
    "training": ("jsonl", "yaml", "resumed"),
    "flags": ("flags",),
    "requests": ("chat", "completions", "protocol"),
}
"""Families by the test file that runs them, so that test processes share the work."""


def all_cases(family: Family, count: int) -> list[int | str]:
    """Return the sound cases, all payloads, and so many damaged ones."""
    return [*family.sounds, *family.payloads, *range(count)]


def shares(count: int) -> dict[str, int]:
    """Return how many of `count` cases each family gets."""
    each, more = divmod(count, len(FAMILIES))
    return {name: each + (number < more) for number, name in enumerate(FAMILIES)}
