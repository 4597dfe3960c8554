"""Worker processes, one per engine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import TRANSFORMERS, Unsupported
from mlx_rgemma.errors import UserError

ROOT = Path(__file__).parents[2]
"""The clone, which has `benchmarks`."""

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment of a worker: no downloads, no output."""


class WorkerError(UserError):
    """A request that a worker process failed."""


class Worker:
    """An engine in a process of its own, which computes only during a request.

    Args:
        name: Name of the engine.
        environment: Variables to add to this process's own; None removes one.
    """

    def __init__(self, name: str, environment: Mapping[str, str | None] | None = None) -> None:
        self.name = name
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, **QUIET, "PYTHONPATH": path, **(environment or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={key: value for key, value in variables.items() if value is not None},
        )

    def request(self, do: str, **arguments: Any) -> Any:
        """Return the answer to one request.

        Raises:
            Unsupported: If the engine does not have the operation.
            WorkerError: If it failed, or the process died.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            raise WorkerError(f"{self.name}: its process ended {how} during {do}.")
        reply = json.loads(line)
        if "unsupported" in reply:
            raise Unsupported(reply["unsupported"])
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}")
        return reply["answer"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.process.kill()
        self.close()


def environment(name: str) -> dict[str, str | None]:
    """Return environment variables for an engine's process; PyTorch brings its own BLAS."""
    return {"LD_PRELOAD": None} if name == TRANSFORMERS else {}
