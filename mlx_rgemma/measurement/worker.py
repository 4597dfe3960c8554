"""An engine in a process of its own: `python -m mlx_rgemma.measurement.worker NAME`.

Reads one JSON object a line from standard input, `{"do": ..., ...}`, and answers each with one on
standard output: `{"answer": ...}`, `{"unsupported": reason}` or `{"error": message}`. Whatever
libraries print goes to standard error.
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

from mlx_rgemma.errors import UserError
from mlx_rgemma.measurement import memory
from mlx_rgemma.measurement.engines import OURS, Engine, Unsupported, make_engine


class Server:
    """Does what it is asked to, with the engine of its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        self._engine = self._engine or make_engine(self.name)
        return self._engine

    def answer(self, request: dict[str, Any]) -> Any:
        """The answer to one request."""
        arguments = {key: value for key, value in request.items() if key != "do"}
        handler: Callable[..., Any] = getattr(self, f"do_{request['do']}")
        return handler(**arguments)

    def do_describe(self) -> dict[str, Any]:
        from mlx_rgemma.measurement import machine

        return machine.describe() if self.name == OURS else machine.describe_peer(self.name)

    def do_bandwidth(self) -> float:
        from mlx_rgemma.measurement.bandwidth import copy_bandwidth

        return copy_bandwidth()

    def do_launches(self, layers: int, block_types: list[str], theirs: bool) -> int:
        from mlx_rgemma.measurement.launch_count import count_model, small_model

        return count_model(small_model(layers, tuple(block_types)), 1, theirs=theirs).total

    def do_write(self, folder: str, shape: str, dtype: str) -> None:
        from mlx_rgemma.measurement.exchange import write_random
        from mlx_rgemma.measurement.shapes import SHAPES

        write_random(Path(folder), SHAPES[shape], dtype)

    def do_copy(self, folder: str, source: str) -> None:
        from mlx_rgemma.measurement.exchange import write_copy

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
    """Answer requests until there are no more."""
    server = Server(name)
    for line in requests:
        try:
            reply = {"answer": server.answer(json.loads(line))}
        except Unsupported as reason:
            reply = {"unsupported": str(reason)}
        except (UserError, OSError) as error:
            reply = {"error": str(error)}
        except Exception as error:  # whatever a library comes up with is told, not lost
            text = " ".join(str(error).split())
            reply = {"error": f"{type(error).__name__}: {text[:300]}"}
        print(json.dumps(reply), file=answers, flush=True)


def main() -> None:
    """Serve the process that started this one."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        try:
            serve(sys.argv[1], sys.stdin, answers)
        except (KeyboardInterrupt, BrokenPipeError):
            os._exit(130)


if __name__ == "__main__":
    main()
