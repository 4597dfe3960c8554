"""A command that does everything that a command must not, for the tests of the harness."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    """Misbehave as told; returns the exit status."""
    what, *places = argv
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "loop":
        while True:
            pass
    elif what == "memory":
        blocks = []
        while True:
            blocks.append(b"x" * 50_000_000)
            time.sleep(0.01)
    elif what == "short peak":
        print(len(b"x" * 1_100_000_000))
    elif what == "traceback":
        raise RecursionError("too deep")
    elif what == "half":
        Path(places[0]).mkdir()
        return refuse("the disk is full")
    elif what == "source":
        Path(places[0]).write_text("damaged")
        return refuse("no")
    elif what == "temporary":
        Path(tempfile.gettempdir(), "left").touch()
    elif what == "escape":
        Path("../../escaped").touch()
    elif what == "nothing made":
        pass
    elif what == "long":
        return refuse("x" * 1000)
    elif what == "control":
        return refuse("\x1b[2J")
    elif what == "two lines":
        return refuse("one\nerror: two")
    elif what == "silent":
        return 1
    elif what == "status":
        return refuse("odd") + 6
    elif what == "refused":
        return refuse("no such file")
    elif what == "exit":
        sys.exit("usage")
    return 0


def refuse(message: str) -> int:
    """Print an error."""
    print(f"error: {message}", file=sys.stderr)
    return 1
