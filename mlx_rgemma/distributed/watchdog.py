"""Knowing whether the other processes are there.

MLX waits without end for a process that never comes, and its back ends differ in what they do when
one is lost. So the processes meet before MLX does, on the addresses that MLX is about to use, and
keep these lines open, beside MLX's own: who sees one break, or hears nothing on it for long, tells
the others, and each ends with a message.

A line carries JSON objects, one a line of text: ``{"arrived": rank}``, ``{"ready": rank}``,
``{"bye": rank}`` and ``{"lost": message}`` are passed on from neighbour to neighbour, an empty
object says no more than that its sender lives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mlx_rgemma.distributed.rank_info import Address, RankInfo
from mlx_rgemma.errors import UserError

TIMEOUT_VARIABLE = "MLX_RGEMMA_PEER_TIMEOUT"
TIMEOUT_SECONDS = 60.0
PARTING_SECONDS = 10.0
"""How long a process that is done waits for the others to be."""

GRACE_SECONDS, MISTAKE_GRACE_SECONDS = 0.5, 5.0
"""How long a process that is told of a failure may take to say that it has failed alike: most
mistakes of a user are found by all of them, sooner or later."""


class Peers:
    """Lines to the other processes.

    Args:
        place: Where this process stands.
        timeout: Seconds to wait for the others to come, and to go without hearing of one.
        end: Called with a message, from a thread, when a process is lost; the message is empty
            where another process tells it. It ends this process.
    """

    def __init__(self, place: RankInfo, timeout: float, end: Callable[[str], None]) -> None:
        self.place, self.timeout, self.end = place, timeout, end
        self._lines: dict[int, Connection] = {}
        self._known: dict[str, set[int]] = {"arrived": set(), "ready": set(), "bye": set()}
        self._changed = threading.Condition()
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ, None)

    def rendezvous(self) -> None:
        """Wait until all processes have come.

        Raises:
            UserError: If one does not come in time, or the address is taken.
        """
        place, deadline = self.place, time.monotonic() + self.timeout
        thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        thread.start()
        self._gossip("arrived", place.rank)
        self._connect(deadline)
        self._gossip("ready", place.rank)
        with self._changed:
            everybody = set(range(place.size))
            while self._known["ready"] != everybody:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise self._nobody(everybody - self._known["arrived"])

    def lost(self, message: str, grace: float = GRACE_SECONDS) -> None:
        """Tell the others that this process cannot go on; they end too, unless they are done.

        Args:
            message: Why.
            grace: Seconds that they have to find that out themselves.
        """
        self._over = True
        if len(self._known["bye"] - {self.place.rank}) == self.place.size - 1:
            return self._send({"bye": self.place.rank})
        text = f"rank {self.place.rank} of {self.place.size} {message}"
        self._send({"lost": text, "grace": grace})

    def shutdown_barrier(self) -> None:
        """Tell the others that this process is done, and wait until they are."""
        self._gossip("bye", self.place.rank)
        deadline = time.monotonic() + PARTING_SECONDS
        with self._changed:
            while len(self._known["bye"]) < self.place.size:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
        self._over = True

    def _connect(self, deadline: float) -> None:
        """Call whom this process calls, and wait for those that call it."""
        place = self.place
        listener = None if place.listen is None else _listener(place.listen)
        to_call, to_come = dict(place.calls), set(place.callers)
        try:
            while to_call or to_come:
                if time.monotonic() > deadline:
                    raise self._nobody(to_come | set(to_call))
                for rank, address in list(to_call.items()):
                    if (connection := _call(address, place.rank)) is not None:
                        del to_call[rank]
                        self._add(Connection(connection, rank, self.timeout))
                answered = None if listener is None else _answer(listener, to_come)
                if answered is not None:
                    connection, rank = answered
                    to_come.discard(rank)
                    self._add(Connection(connection, rank, self.timeout))
                elif listener is None:
                    time.sleep(0.1)
        finally:
            # Before anyone is told that this process is ready: MLX listens here next.
            if listener is not None:
                listener.close()

    def _nobody(self, missing: set[int]) -> UserError:
        place = self.place
        names = ", ".join(
            f"rank {rank} ({':'.join(map(str, place.calls[rank]))})"
            if rank in place.calls
            else f"rank {rank}"
            for rank in sorted(missing)
        )
        message = (
            f"waited {self.timeout:g} s for {names} in vain; see that the command runs there, and"
            " that the addresses of the hostfile can be reached"
        )
        self.lost(message)
        return UserError(f"rank {place.rank} of {place.size} {message}.")

    def _add(self, line: Connection) -> None:
        with self._changed:
            # A ring of two has two lines between the same processes.
            self._lines[line.socket.fileno()] = line
            for kind, ranks in self._known.items():
                for rank in ranks:
                    line.send({kind: rank})
        self._selector.register(line.socket, selectors.EVENT_READ, line)
        self._wake.send(b".")

    def _gossip(self, kind: str, rank: int) -> None:
        """Note something, and pass it on if it is new.

        Nobody here may go on before it is passed on: MLX, once it connects, lets no thread run, and
        the next process would not hear of it.
        """
        with self._changed:
            if rank in self._known[kind]:
                return
            self._known[kind].add(rank)
            self._send({kind: rank})
            self._changed.notify_all()

    def _send(self, message: Mapping[str, Any]) -> None:
        for line in list(self._lines.values()):
            line.send(message)

    def _listen(self) -> None:
        """Read what comes on the lines, until one of them breaks."""
        interval = min(5.0, self.timeout / 6)
        beat = time.monotonic()
        while not self._over:
            for key, _ in self._selector.select(interval):
                line = key.data
                if line is None:
                    key.fileobj.recv(64)  # type: ignore[union-attr]
                elif not self._read(line):
                    return
            now = time.monotonic()
            if now - beat >= interval:
                beat = now
                self._send({})
            for line in list(self._lines.values()):
                # Measured from the last look, too: this thread may have been kept waiting itself.
                line.timeout_left -= min(now - line.looked, 2 * interval)
                line.looked = now
                if line.timeout_left < 0 and line.rank not in self._known["bye"]:
                    self._lose(
                        f"rank {line.rank} of {self.place.size} has not been heard of for"
                        f" {self.timeout:g} s"
                    )
                    return

    def _read(self, line: Connection) -> bool:
        """Take what a line brings; False when that is the end."""
        try:
            messages = line.receive()
        except ValueError:
            self._lose(
                f"what answers in place of rank {line.rank} of {self.place.size} is another"
                " program; see that the addresses of the hostfile are those of the machines"
            )
            return False
        line.timeout_left = self.timeout
        for message in messages or ():
            if "lost" in message:
                self._lose(str(message["lost"]), told_grace=float(message.get("grace", 0)))
                return False
            for kind, rank in message.items():
                if kind in self._known:
                    self._gossip(kind, int(rank))
        if messages is None:
            self._selector.unregister(line.socket)
            del self._lines[line.socket.fileno()]
            if line.rank not in self._known["bye"]:
                self._lose(f"rank {line.rank} of {self.place.size} has ended or cannot be reached")
                return False
        return True

    def _lose(self, message: str, *, told_grace: float | None = None) -> None:
        if self._over:
            return
        told = told_grace is not None
        grace = GRACE_SECONDS if told_grace is None else told_grace
        self._send({"lost": message, "grace": grace})
        if told:
            time.sleep(grace)
        # Among those that were told, the first one is enough to tell the user.
        self.end("" if told and self.place.rank > 0 else message)


class Connection:
    """A connection to another process."""

    def __init__(self, connection: socket.socket, rank: int, timeout_left: float) -> None:
        self.socket, self.rank = connection, rank
        self.timeout_left, self.looked = timeout_left, time.monotonic()
        self.rest = b""
        self.lock = threading.Lock()
        connection.settimeout(5.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Mapping[str, Any]) -> None:
        # A line that is broken is noticed where it is read.
        with self.lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None at the end.

        Raises:
            ValueError: If they are none of a process.
        """
        try:
            data = self.socket.recv(4096)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        messages = [json.loads(text) for text in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("no message of a process")
        return messages


def timeout_seconds() -> float:
    """How long to wait for another process: 60 s, or what the user has set.

    Raises:
        UserError: If that is no number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e6:
        raise UserError(f"{TIMEOUT_VARIABLE} is {text!r}, expected a number of seconds from 1 on.")
    return seconds


def end_process(message: str) -> None:
    """Say why, and end at once: the main thread may wait for a process that is no more."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        if message:
            sys.stderr.write(f"error: {message}; ending.\n")
        sys.stderr.flush()
    os._exit(1)


def _listener(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        listener.settimeout(0.1)
    except OSError as error:
        listener.close()
        hint = (
            "is another command running? mlx.launch --starting-port chooses other ports."
            if error.errno == errno.EADDRINUSE
            else "see that the hostfile has an address of this machine for it."
        )
        raise UserError(
            f"cannot listen on {address[0]}:{address[1]} ({error.strerror}); {hint}"
        ) from error
    return listener


def _call(address: Address, rank: int) -> socket.socket | None:
    """Call a process and say who calls; None if it does not answer."""
    try:
        connection = socket.create_connection(address, timeout=1.0)
        connection.sendall(b'{"rank": %d}\n' % rank)
    except OSError:
        return None
    return connection


def _answer(listener: socket.socket, expected: set[int]) -> tuple[socket.socket, int] | None:
    """A process that calls, and its number; None if none does, or it is something else."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return None
    try:
        connection.settimeout(2.0)
        greeting = b""
        while not greeting.endswith(b"\n") and len(greeting) < 64:
            byte = connection.recv(1)
            if not byte:
                break
            greeting += byte
        rank = int(json.loads(greeting)["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        rank = -1
    if rank in expected:
        return connection, rank
    connection.close()
    return None
