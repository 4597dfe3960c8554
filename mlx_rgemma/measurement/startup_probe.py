"""`mlx_rgemma.generate` with a ledger of where its time goes: `startup` runs this, again and again.

Prints the seconds of each stage as one JSON object, behind what the command prints. A stage ends
where another begins inside it: no second counts twice.
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
"""Stages by the package that is being imported; what it imports in turn counts for it."""

FUNCTIONS = {"tokenizer": "_load_tokenizer", "weights": "_load_model"}
"""Stages by the function of `mlx_rgemma.checkpoints.load` that is running."""

REST = "rest"


class Ledger:
    """Seconds of each stage, the innermost counting."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running = [REST]
        self.since = time.perf_counter()

    def switch(self) -> None:
        """Book the time since the last switch on the innermost stage."""
        now = time.perf_counter()
        stage = self.running[-1]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.since
        self.since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time is booked on a stage."""

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
        """Book imports on the package that they are of."""
        plain = builtins.__import__
        watched = {name: self.timed(stage, plain) for name, stage in PACKAGES.items()}

        def find(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            package = ((globals or {}).get("__package__") or "") if level else name
            do = watched.get(package.partition(".")[0], plain)
            return do(name, globals, locals, fromlist, level)

        builtins.__import__ = find


def main(arguments: list[str], started: float) -> None:
    """Run the command; `started` is the time of day when its process was asked for."""
    ledger = Ledger()
    ledger.watch_imports()
    from mlx_rgemma.checkpoints.load import load as loading

    for stage, name in FUNCTIONS.items():
        setattr(loading, name, ledger.timed(stage, getattr(loading, name)))
    sys.argv = [COMMAND, *arguments]
    try:
        runpy.run_module(COMMAND, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    ledger.switch()
    print(json.dumps({"python": _BEGIN - started, **ledger.seconds}))


if __name__ == "__main__":
    main(sys.argv[2:], float(sys.argv[1]))
