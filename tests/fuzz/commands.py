"""Runs cases of commands in a worker process, and judges what they did."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fuzz.job import Box, Failure, Job, Result

CPU_S = 10.0
"""CPU time that a case may take."""
WARM_UP_CPU_S = 240.0
"""For a sound case, which may have to import, and to compile loops."""
WALL_S = 150.0
"""Wall time, generous: the machine may be busy."""
MEMORY = 1_000_000_000
ADDRESS_SPACE = 8 << 30
"""A net for what grows faster than it is looked at (Linux)."""
WRITTEN = 1_000_000_000
OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "Unable to allocate", "Cannot allocate memory")
"""What a refusal says that only the net of `ADDRESS_SPACE` brought about."""
LINE = 600
"""Characters that a line of a message may have, the folder of the case not counted."""
STALE = 500_000_000
"""Memory of an idle worker that is no longer worth keeping."""

TESTS = Path(__file__).parents[1]


def child_environment() -> dict[str, str]:
    """Return the environment of child processes: this package, no network, one thread for BLAS."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
        "HF_HUB_OFFLINE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


class CommandTarget:
    """A worker process, started when it is needed and again after a failure."""

    def __init__(self, sources: Path) -> None:
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def run(self, job: Job, box: Box, *, sound: bool = False) -> Result:
        """Run a case and judge it.

        Args:
            job: The command.
            box: Its files.
            sound: Whether it must be accepted.
        """
        before = box.contents()
        answer = self._ask(job, box, WARM_UP_CPU_S if sound else CPU_S)
        if isinstance(answer, Failure):
            self.close()
            return Result("failed", job.note, answer)
        failure = _judge(job, answer, str(box.root)) or _leftovers(job, answer, before, box)
        message = answer["err"].strip().replace("\r", "\n").split("\n")[-1][-LINE:]
        if failure is None and not sound and answer["cpu_s"] > CPU_S:
            failure = Failure("hang", f"{answer['cpu_s']:.1f} s of CPU time")
        if failure is not None:
            if failure.kind in ("memory", "hang", "traceback"):
                self.close()
            return Result("failed", job.note, failure, message)
        accepted = answer["status"] in (0, None, 130)
        if sound and answer["status"] not in ((0, None, 130) if job.until else (0, None)):
            return Result(
                "failed", job.note, Failure("sound", f"a sound case is refused: {message}")
            )
        return Result("accepted" if accepted else "refused", job.note, None, message)

    def _ask(self, job: Job, box: Box, cpu_s: float) -> dict[str, Any] | Failure:
        process = self._worker()
        assert process.stdin is not None and process.stdout is not None
        request = dataclasses.asdict(job)
        request |= {"module": f"{job.package}.{job.command}"}
        request |= {"cwd": str(box.cwd), "tmp": str(box.tmp), "cpu_s": cpu_s}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        deadline = time.monotonic() + WALL_S + (WARM_UP_CPU_S if cpu_s > CPU_S else 0)
        while True:
            if select.select([process.stdout], [], [], 0.05)[0]:
                line = process.stdout.readline()
                return json.loads(line) if line else _death(process)
            if (used := resident(process.pid)) > MEMORY:
                return Failure("memory", f"{used / 1e9:.2f} GB and growing")
            if time.monotonic() > deadline:
                return Failure("hang", f"no end after {WALL_S:.0f} s, without using the CPU")

    def _worker(self) -> subprocess.Popen[str]:
        if self._process is not None and resident(self._process.pid) > STALE:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=child_environment(),
            )
        return self._process


def resident(pid: int) -> int:
    """Return the memory of a process in bytes; 0 where that cannot be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def _death(process: subprocess.Popen[str]) -> Failure:
    status = process.wait()
    if status == -signal.SIGXCPU:
        return Failure("hang", f"more than {CPU_S:.0f} s of CPU time")
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return Failure("crash", f"the process ended with {name}")


def _judge(job: Job, answer: dict[str, Any], root: str) -> Failure | None:
    """Judge the status, the output and the memory."""
    status, err = answer["status"], answer["err"].replace("\r", "\n")
    if answer["problem"]:
        return Failure("traceback", answer["problem"][-3000:])
    for text in (err, answer["out"]):
        if "Traceback (most recent call last)" in text or "panicked at" in text:
            return Failure("traceback", text[-3000:])
    if answer["peak"] > MEMORY:
        return Failure("memory", f"{answer['peak'] / 1e9:.2f} GB at the peak")
    if any(word in err for word in OUT_OF_MEMORY):
        return Failure("memory", f"it asked for more than there is: {err[-500:]}")
    if answer["written"] > WRITTEN:
        return Failure("writes", f"{answer['written'] / 1e9:.2f} GB written")
    lines = [line for line in err.replace(root, "").split("\n") if line.strip()]
    if long := [line for line in lines if len(line) > LINE]:
        return Failure("message", f"a line of {len(long[0])} characters: {long[0][:300]}")
    if odd := [line for line in lines if not line.replace("\t", " ").isprintable()]:
        return Failure("message", f"control characters in {odd[0][:300]!r}")
    if status in (0, None) or (status == 130 and (job.interrupt or job.until)):
        return None
    told = [line for line in lines if line.startswith("error: ") or ": error: " in line]
    if status not in (1, 2) or len(told) != 1 or lines[-1] != told[0]:
        return Failure("message", f"status {status!r}, not one line of error: {err[-1000:]!r}")
    return None


def _leftovers(
    job: Job, answer: dict[str, Any], before: dict[str, str], box: Box
) -> Failure | None:
    """See that success made its target and nothing else, and that a refusal made nothing."""
    after = box.contents()
    made = answer["status"] in (0, None, 130) or (job.runs and "Starting training" in answer["out"])
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    odd = [
        name
        for name in changed
        if not (made and any(name == t or name.startswith(f"{t}/") for t in job.target))
    ]
    if outside := {p.name for p in box.root.parent.iterdir()} - {box.root.name}:
        return Failure("escaped", f"outside of the case's folder: {', '.join(sorted(outside))}")
    if odd:
        what = "changed or left" if made else "changed or left by a refusal"
        return Failure("left", f"{what}: {', '.join(odd[:5])}; {answer['err'].strip()[-300:]}")
    missing = [t for t in job.target if not (box.root / t).exists()]
    if missing and answer["status"] in (0, None) and not job.interrupt:
        return Failure("left", f"no {missing[0]} after status 0")
    if partial := [name for name in changed if Path(name).name.startswith(".")]:
        return Failure("left", f"a temporary file: {partial[0]}")
    return None
