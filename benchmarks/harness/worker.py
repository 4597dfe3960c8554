"""An engine in a process of its own: `python -m benchmarks.harness.worker NAME`.

Reads one JSON object per line from standard input, `{"do": ..., ...}`, and writes one to
standard output for each: `{"answer": ...}`, `{"unsupported": reason}` or `{"error": message}`.
Output of libraries goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from benchmarks.harness import memory
from benchmarks.harness.engines import OURS, Engine, Unsupported, describe_baseline, make_engine
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation import machine


class Server:
    """Handles requests with one engine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        self._engine = self._engine or make_engine(self.name)
        return self._engine

    def answer(self, request: dict[str, Any]) -> Any:
        """Return the answer to one request."""
        arguments = {key: value for key, value in request.items() if key != "do"}
        handler: Callable[..., Any] = getattr(self, f"do_{request['do']}")
        return handler(**arguments)

    def do_describe(self) -> dict[str, Any]:
        return machine.describe() if self.name == OURS else describe_baseline(self.name)

    def do_bandwidth(self) -> float:
        return machine.copy_bandwidth()

    def do_launches(self, layers: int, block_types: list[str], theirs: bool) -> int:
        from mlx_rgemma.evaluation.launch_count import count_model, small_model

        return count_model(small_model(layers, tuple(block_types)), 1, theirs=theirs).total

    def do_write(self, folder: str, shape: str, dtype: str) -> None:
        from benchmarks.harness.hf_export import write_random
        from mlx_rgemma.evaluation.random_model import SHAPES

        write_random(Path(folder), SHAPES[shape], dtype)

    def do_copy(self, folder: str, source: str) -> None:
        from benchmarks.harness.hf_export import write_copy

        write_copy(Path(folder), Path(source))

    def do_load(self, **arguments: Any) -> dict[str, Any]:
        return asdict(self.engine.load(**arguments))

    def do_generate(self, **arguments: Any) -> dict[str, Any]:
        return self._with_memory(lambda: asdict(self.engine.generate(**arguments)))

    def do_generate_after(self, **arguments: Any) -> dict[str, Any]:
        return self._with_memory(lambda: asdict(self.engine.generate_after(**arguments)))

    def do_train(self, **arguments: Any) -> dict[str, Any]:
        return self._with_memory(lambda: {"step_s": self.engine.train(**arguments)})

    def _with_memory(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        gc.collect()
        self.engine.peak_memory()
        memory.reset_process_peak()
        found = measure()
        return {
            **found,
            "peak_memory_bytes": self.engine.peak_memory(),
            "process_peak_bytes": memory.process_peak(),
        }


def serve(name: str, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until the input ends."""
    server = Server(name)
    for line in requests:
        try:
            reply = {"answer": server.answer(json.loads(line))}
        except Unsupported as reason:
            reply = {"unsupported": str(reason)}
        except (UserError, OSError) as error:
            reply = {"error": str(error)}
        except Exception as error:  # a library may raise anything
            text = " ".join(str(error).split())
            reply = {"error": f"{type(error).__name__}: {text[:300]}"}
        print(json.dumps(reply), file=answers, flush=True)


def main() -> None:
    """Serve the parent process."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        try:
            serve(sys.argv[1], sys.stdin, answers)
        except (KeyboardInterrupt, BrokenPipeError):
            os._exit(130)


if __name__ == "__main__":
    main()
