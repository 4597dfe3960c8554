"""Starting commands under mlx.launch, on this machine, and seeing that nothing is left of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LAUNCH = """
import os, signal, sys, threading, time
from mlx._distributed_utils.launch import main

def watch(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=watch, args=(int(sys.argv.pop(1)),), daemon=True).start()
main()
"""
"""mlx.launch, which ends with all that it has started when the tests themselves are killed."""


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
"""Of tests that run side by side. Each has ports of its own: those found free are taken later."""
_turn = itertools.count(os.getpid() % 100)


def free_ports(count: int) -> list[int]:
    """Ports in a row that nothing listens on, below those that the system gives out."""
    for _ in range(100):
        first = 20000 + 1200 * WORKER + 12 * (next(_turn) % 100)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for port, probe in enumerate(sockets, start=first):
                probe.bind(("127.0.0.1", port))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise AssertionError("no free ports")


class Launched:
    """A command in several processes, of which none is left when the `with` block ends.

    Args:
        size: How many.
        command: Arguments of the Python interpreter.
        environment: Variables beside this process's.
    """

    def __init__(self, size: int, *command: str, **environment: str) -> None:
        self.out = tempfile.TemporaryFile()  # noqa: SIM115
        self.err = tempfile.TemporaryFile()  # noqa: SIM115
        port = free_ports(size)[0]
        launcher = ["-n", str(size), "--backend", "ring", "-p", str(port), "--", sys.executable]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(os.getpid()), *launcher, *command],
            stdin=subprocess.PIPE,  # at the end of its input, mlx.launch would spin
            stdout=self.out,
            stderr=self.err,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        _kill_group(self.process.pid)
        self.process.stdin.close()
        self.process.wait()
        self.out.close()
        self.err.close()

    def text(self) -> str:
        """What has been printed so far."""
        return _all(self.out)

    def errors(self) -> str:
        return _all(self.err)

    def wait_until(self, condition: Callable[[str], bool], seconds: float) -> None:
        """Wait until what has been printed, or told as an error, meets a condition."""
        deadline = time.monotonic() + seconds
        while not (condition(self.text()) or condition(self.errors())):
            assert time.monotonic() < deadline, (self.text(), self.errors())
            assert self.process.poll() is None, (self.text(), self.errors())
            time.sleep(0.05)

    def rank(self, number: int) -> int:
        """The process that has a number."""
        for entry in Path("/proc").iterdir():
            # Any process may end while it is looked at, and others' may not be.
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
                if entry.name.isdigit() and os.getpgid(int(entry.name)) == self.process.pid:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    if f"MLX_RANK={number}".encode() in variables:
                        return int(entry.name)
        raise AssertionError(f"no rank {number}")

    def end(self, seconds: float) -> None:
        """Wait for the end of all; nothing may be left."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.text()} {self.errors()}") from None
        left = _kill_group(self.process.pid)
        assert not left, (self.text(), self.errors())


class Ended(NamedTuple):
    """What a command printed in all."""

    text: str
    errors: str


def launch(size: int, *command: str, seconds: float = 300, **environment: str) -> Ended:
    """Run a command to its end."""
    with Launched(size, *command, **environment) as launched:
        launched.end(seconds)
        return Ended(launched.text(), launched.errors())


def _all(file) -> str:
    return os.pread(file.fileno(), 1 << 20, 0).decode()


def _kill_group(group: int) -> bool:
    """Kill what is left of a process group; whether there was anything."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
