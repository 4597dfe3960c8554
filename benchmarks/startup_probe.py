"""Run `mlx_rgemma.generate` and print the seconds of each stage of its start as a JSON object.

A stage is suspended while another runs inside it: no second counts twice.
"""

import time

_BEGIN = time.time()

import builtins  # noqa: E402
import json  # noqa: E402
import runpy  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

COMMAND = "mlx_rgemma.generate"

PACKAGES = {
    "mlx": "mlx",
    "mlx_rgemma": "package",
    "mlx_lm": "mlx_lm",
    "transformers": "transformers",
}
"""Stages by the package that is imported, its own imports included."""

FUNCTIONS = {"tokenizer": "_load_tokenizer", "weights": "_load_model"}
"""Stages by the running function of `mlx_rgemma.checkpoints.load`."""

REST = "rest"


class Profiler:
    """Seconds of each stage; the innermost running stage counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running = [REST]
        self.since = time.perf_counter()

    def switch(self) -> None:
        """Add the time since the last switch to the innermost stage."""
        now = time.perf_counter()
        stage = self.running[-1]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.since
        self.since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts for a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.running.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.running.pop()

        return run

    def watch_imports(self) -> None:
        """Time the imports of `PACKAGES`."""
        original = builtins.__import__
        watched = {name: self.timed(stage, original) for name, stage in PACKAGES.items()}

        def find(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            package = ((globals or {}).get("__package__") or "") if level else name
            do = watched.get(package.partition(".")[0], original)
            return do(name, globals, locals, fromlist, level)

        builtins.__import__ = find


def main(arguments: list[str], started: float) -> None:
    """Run the command; `started` is the time of day at which its process was started."""
    profiler = Profiler()
    profiler.watch_imports()
    from mlx_rgemma.checkpoints import load as loading

    for stage, name in FUNCTIONS.items():
        setattr(loading, name, profiler.timed(stage, getattr(loading, name)))
    sys.argv = [COMMAND, *arguments]
    try:
        runpy.run_module(COMMAND, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    profiler.switch()
    print(json.dumps({"python": _BEGIN - started, **profiler.seconds}))


if __name__ == "__main__":
    main(sys.argv[2:], float(sys.argv[1]))
