"""A watchdog that ends all ranks with a message when one is lost.

MLX waits forever for a rank that never appears, and its backends differ in how they handle a lost
one. So the ranks connect before MLX does, on the addresses that MLX is about to use, and keep these
connections open. If a connection breaks, or is silent for too long, the failure is forwarded to all
ranks, and each ends with a message.

Messages are JSON objects, one per line: ``{"arrived": rank}``, ``{"ready": rank}``, ``{"bye":
rank}`` and ``{"lost": message}`` are forwarded from neighbour to neighbour (gossip). An empty
object is a heartbeat.
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
from mlx_rgemma.errors import UserError, shown

TIMEOUT_VARIABLE = "MLX_RGEMMA_PEER_TIMEOUT"
TIMEOUT_SECONDS = 60.0
SHUTDOWN_SECONDS = 10.0
"""Timeout of the shutdown barrier."""

GRACE_SECONDS, MISTAKE_GRACE_SECONDS = 0.5, 5.0
"""Time for a rank to report its own failure after another's: all ranks find most user errors."""


class Watchdog:
    """Connections to the other ranks, and the thread that watches them.

    Args:
        info: Rank and addresses.
        timeout: Seconds to wait for the other ranks to appear, and between signs of life.
        end: Called with a message, from a thread, when a rank is lost, to end this process. The
            message is empty if rank 0 prints it.
    """

    def __init__(self, info: RankInfo, timeout: float, end: Callable[[str], None]) -> None:
        self.info, self.timeout, self.end = info, timeout, end
        self._connections: dict[int, Connection] = {}
        self._known: dict[str, set[int]] = {"arrived": set(), "ready": set(), "bye": set()}
        self._changed = threading.Condition()
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ, None)

    def rendezvous(self) -> None:
        """Wait until all ranks are connected.

        Raises:
            UserError: If one does not appear in time, or the address is in use.
        """
        info, deadline = self.info, time.monotonic() + self.timeout
        thread = threading.Thread(target=self._listen, name="watchdog", daemon=True)
        thread.start()
        self._gossip("arrived", info.rank)
        self._connect(deadline)
        self._gossip("ready", info.rank)
        with self._changed:
            all_ranks = set(range(info.size))
            while self._known["ready"] != all_ranks:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise self._timed_out(all_ranks - self._known["arrived"])

    def report_failure(self, message: str, grace: float = GRACE_SECONDS) -> None:
        """Report a failure of this rank; the others end as well, unless they are done.

        Args:
            message: The reason.
            grace: Seconds for them to report the same failure themselves.
        """
        self._over = True
        if len(self._known["bye"] - {self.info.rank}) == self.info.size - 1:
            return self._send({"bye": self.info.rank})
        text = f"rank {self.info.rank} of {self.info.size} {message}"
        self._send({"lost": text, "grace": grace})

    def shutdown_barrier(self) -> None:
        """Report that this rank is done, and wait until all are."""
        self._gossip("bye", self.info.rank)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        with self._changed:
            while len(self._known["bye"]) < self.info.size:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
        self._over = True

    def _connect(self, deadline: float) -> None:
        """Connect to the neighbours of this rank, and accept their connections."""
        info = self.info
        listener = None if info.listen is None else _listener(info.listen)
        to_call, to_accept = dict(info.calls), set(info.callers)
        try:
            while to_call or to_accept:
                if time.monotonic() > deadline:
                    raise self._timed_out(to_accept | set(to_call))
                for rank, address in list(to_call.items()):
                    if (connection := _call(address, info.rank)) is not None:
                        del to_call[rank]
                        self._add(Connection(connection, rank, self.timeout))
                accepted = None if listener is None else _accept(listener, to_accept)
                if accepted is not None:
                    connection, rank = accepted
                    to_accept.discard(rank)
                    self._add(Connection(connection, rank, self.timeout))
                elif listener is None:
                    time.sleep(0.1)
        finally:
            # Close before reporting this rank as ready: MLX listens here next.
            if listener is not None:
                listener.close()

    def _timed_out(self, missing: set[int]) -> UserError:
        info = self.info
        names = ", ".join(
            f"rank {rank} ({':'.join(map(str, info.calls[rank]))})"
            if rank in info.calls
            else f"rank {rank}"
            for rank in sorted(missing)
        )
        message = (
            f"timed out after {self.timeout:g} s waiting for {names}; check that the command runs"
            " there, and that the addresses of the hostfile can be reached"
        )
        self.report_failure(message)
        return UserError(f"rank {info.rank} of {info.size} {message}.")

    def _add(self, connection: Connection) -> None:
        with self._changed:
            # A ring of two has two connections between the same ranks.
            self._connections[connection.socket.fileno()] = connection
            for kind, ranks in self._known.items():
                for rank in ranks:
                    connection.send({kind: rank})
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        self._wake.send(b".")

    def _gossip(self, kind: str, rank: int) -> None:
        """Record a message, and forward it if it is new.

        It must be forwarded before any thread continues: MLX holds the interpreter lock once it
        connects, and the next rank would never receive the message.
        """
        with self._changed:
            if rank in self._known[kind]:
                return
            self._known[kind].add(rank)
            self._send({kind: rank})
            self._changed.notify_all()

    def _send(self, message: Mapping[str, Any]) -> None:
        for connection in list(self._connections.values()):
            connection.send(message)

    def _listen(self) -> None:
        """Read the connections until one of them breaks."""
        interval = min(5.0, self.timeout / 6)
        beat = time.monotonic()
        while not self._over:
            for key, _ in self._selector.select(interval):
                connection = key.data
                if connection is None:
                    key.fileobj.recv(64)  # type: ignore[union-attr]
                elif not self._read(connection):
                    return
            now = time.monotonic()
            if now - beat >= interval:
                beat = now
                self._send({})
            for connection in list(self._connections.values()):
                # Bounded per check: this thread may not have been scheduled itself.
                connection.timeout_left -= min(now - connection.checked, 2 * interval)
                connection.checked = now
                if connection.timeout_left < 0 and connection.rank not in self._known["bye"]:
                    self._end(
                        f"rank {connection.rank} of {self.info.size} has been silent for"
                        f" {self.timeout:g} s"
                    )
                    return

    def _read(self, connection: Connection) -> bool:
        """Handle the messages of a connection; return False if the group has failed."""
        try:
            messages = connection.receive()
        except ValueError:
            self._end(
                f"another program answers at the address of rank {connection.rank} of"
                f" {self.info.size}; check the addresses of the hostfile"
            )
            return False
        connection.timeout_left = self.timeout
        for message in messages or ():
            if "lost" in message:
                self._end(str(message["lost"]), reported_grace=float(message.get("grace", 0)))
                return False
            for kind, rank in message.items():
                if kind in self._known:
                    self._gossip(kind, int(rank))
        if messages is None:
            self._selector.unregister(connection.socket)
            del self._connections[connection.socket.fileno()]
            rank = connection.rank
            if rank not in self._known["bye"]:
                self._end(f"rank {rank} of {self.info.size} has ended or cannot be reached")
                return False
        return True

    def _end(self, message: str, *, reported_grace: float | None = None) -> None:
        """Forward a failure and end; `reported_grace` is set if another rank reported it."""
        if self._over:
            return
        reported = reported_grace is not None
        grace = GRACE_SECONDS if reported_grace is None else reported_grace
        self._send({"lost": message, "grace": grace})
        if reported:
            time.sleep(grace)
        # Of the ranks that received a report, rank 0 prints it.
        self.end("" if reported and self.info.rank > 0 else message)


class Connection:
    """A connection to another rank."""

    def __init__(self, connection: socket.socket, rank: int, timeout_left: float) -> None:
        self.socket, self.rank = connection, rank
        self.timeout_left, self.checked = timeout_left, time.monotonic()
        self.rest = b""
        self.lock = threading.Lock()
        connection.settimeout(5.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Mapping[str, Any]) -> None:
        # A broken connection is detected when it is read.
        with self.lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages received; None at the end of the connection.

        Raises:
            ValueError: If they are not messages of a watchdog.
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
            raise ValueError("not a message of a watchdog")
        return messages


def timeout_seconds() -> float:
    """Return the timeout: 60 s, or the environment variable.

    Raises:
        UserError: If the variable is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e6:
        raise UserError(
            f"{TIMEOUT_VARIABLE} is {shown(text)}, expected a number of seconds from 1 on."
        )
    return seconds


def end_process(message: str) -> None:
    """Print a message and end at once: the main thread may be waiting for a lost rank."""
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
            else "check that the hostfile has an address of this machine for it."
        )
        raise UserError(
            f"cannot listen on {address[0]}:{address[1]} ({error.strerror}); {hint}"
        ) from error
    return listener


def _call(address: Address, rank: int) -> socket.socket | None:
    """Connect to a rank and send the own rank; None if it does not answer."""
    try:
        connection = socket.create_connection(address, timeout=1.0)
        connection.sendall(b'{"rank": %d}\n' % rank)
    except OSError:
        return None
    return connection


def _accept(listener: socket.socket, expected: set[int]) -> tuple[socket.socket, int] | None:
    """Accept the connection of an expected rank; None if there is none."""
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
