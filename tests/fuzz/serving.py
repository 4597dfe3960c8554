"""Runs cases of requests against one server, and judges the answers and the server."""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fuzz.commands import ADDRESS_SPACE, CPU_S, MEMORY, child_environment, resident
from fuzz.job import Box, Failure, Result

WALL_S = 90.0
MESSAGE = 500
CHECK_EVERY = 20
GOOD = {"prompt": "Lily met a dog", "max_tokens": 8}
OTHER_STATUS = (501, 505)
"""What a server may say of methods and versions that it does not know."""


@dataclass
class Request:
    """Bytes that are sent to the server.

    Attributes:
        raw: All of it, head and body; `HOST` stands for the server's address.
        note: What is wrong with it.
        leave_after_s: Seconds after which the client leaves a request for a long answer.
        protocol: Whether the head is what is damaged: then the connection may just be closed.
    """

    raw: bytes
    note: str = ""
    leave_after_s: float = 0.0
    protocol: bool = False


def post(path: str, body: bytes, note: str, leave_after_s: float = 0.0) -> Request:
    """Return a sound head with a body."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return Request(head.encode() + body, note, leave_after_s)


class ServerTarget:
    """A server with the tiny chat model, started again after a failure."""

    def __init__(self, sources: Path) -> None:
        self.sources = sources
        self.process: subprocess.Popen[str] | None = None
        self._cases = 0
        self._expected: bytes | None = None

    def close(self) -> None:
        """End the server."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self._log.close()
            self.process = None

    def run(self, request: Request, box: Box, *, sound: bool = False) -> Result:
        """Send a request and judge what came of it."""
        if (problem := self._start()) is not None:
            return Result("failed", request.note, problem)
        cpu = self._cpu()
        answer, failure = self._send(request)
        failure = failure or self._judge(request, answer, self._cpu() - cpu)
        self._cases += 1
        if failure is None and (sound or self._cases % CHECK_EVERY == 0):
            failure = self._still_well()
        status = answer[9:12].decode("latin-1")
        if failure is not None:
            self.close()
        if sound and failure is None and status != "200":
            failure = Failure("sound", f"a sound request is answered with {answer[:300]!r}")
        accepted = "accepted" if status == "200" else "refused"
        return Result(
            "failed" if failure else accepted, request.note, failure, answer[:120].decode("latin-1")
        )

    def _start(self) -> Failure | None:
        if self.process is not None:
            return None
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (open as long as the server)
        self._seen = 0
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlx_rgemma.server", "--port", "0", "--log-level", "INFO"),
                *("--model", str(self.sources / "tiny")),
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=child_environment(),
        )
        assert self.process.stdout is not None
        greeting = ""
        while "Serving at" not in greeting:
            line = self.process.stdout.readline()
            if not line:
                log = self._new_log().decode(errors="replace")
                self.close()
                return Failure("server", f"does not start: {log[-1000:]}")
            greeting += line
        self.port = int(greeting.rsplit(":", 1)[1].split("/")[0])
        if sys.platform == "linux":
            resource.prlimit(self.process.pid, resource.RLIMIT_AS, (ADDRESS_SPACE,) * 2)
        return None

    def _send(self, request: Request) -> tuple[bytes, Failure | None]:
        """Send all, close the sending side, and read until the server closes the connection."""
        assert self.process is not None
        raw = request.raw.replace(b"HOST", f"127.0.0.1:{self.port}".encode(), 1)
        started, cpu, answer = time.monotonic(), self._cpu(), b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=WALL_S) as connection:
            try:
                connection.sendall(raw)
                connection_closed = False
            except OSError:  # refused before everything was read
                connection_closed = True
            if request.protocol and not connection_closed:
                connection.shutdown(socket.SHUT_WR)
            while True:
                if select.select([connection], [], [], 0.02)[0]:
                    try:
                        data = connection.recv(1 << 16)
                    except OSError:
                        data = b""
                    answer += data[: max(0, (1 << 20) - len(answer))]
                    if not data:
                        return answer, None
                spent = time.monotonic() - started
                if request.leave_after_s and spent > request.leave_after_s:
                    return answer, None
                if self.process.poll() is not None:
                    return answer, None
                if (used := resident(self.process.pid)) > MEMORY:
                    return answer, Failure("memory", f"{used / 1e9:.2f} GB and growing")
                if self._cpu() - cpu > CPU_S:
                    return answer, Failure("hang", f"more than {CPU_S:.0f} s of CPU time")
                if spent > WALL_S:
                    return answer, Failure("hang", f"no answer in {WALL_S:.0f} s: {answer[:200]!r}")

    def _judge(self, request: Request, answer: bytes, cpu_s: float) -> Failure | None:
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.02 if answer else 0.5)
        if self.process.poll() is not None:
            log = self._new_log().decode(errors="replace")
            return Failure(
                "crash", f"the server ended with {self.process.returncode}: {log[-1000:]}"
            )
        log = self._new_log()
        if any((b < 32 and b not in b"\t\n") or b == 127 for b in log):
            return Failure("log", f"control characters in {log[-500:]!r}")
        if b" - ERROR - " in log:
            return Failure("server", log.decode(errors="replace")[-3000:])
        if long := [line for line in log.split(b"\n") if len(line) > 4 * MESSAGE]:
            return Failure("log", f"a line of {len(long[0])} bytes: {long[0][:200]!r}")
        if (used := resident(self.process.pid)) > MEMORY:
            return Failure("memory", f"{used / 1e9:.2f} GB")
        if cpu_s > CPU_S:
            return Failure("hang", f"{cpu_s:.1f} s of CPU time")
        if request.leave_after_s or (request.protocol and not answer):
            return None
        return _judge_answer(answer, request.protocol)

    def _new_log(self) -> bytes:
        self._log.seek(self._seen)
        log = self._log.read()
        self._seen += len(log)
        return log

    def _cpu(self) -> float:
        """Return the CPU time of the server in seconds; 0 where that cannot be told."""
        assert self.process is not None
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _still_well(self) -> Failure | None:
        """See that /health and a good request are answered as at the beginning."""
        health, failure = self._send(
            Request(b"GET /health HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n")
        )
        if failure or health[9:12] != b"200":
            return failure or Failure("server", f"/health answers {health[:200]!r}")
        answer, failure = self._send(post("/v1/completions", json.dumps(GOOD).encode(), ""))
        if failure or answer[9:12] != b"200":
            return failure or Failure("server", f"a good request is answered {answer[:200]!r}")
        text = json.loads(answer.split(b"\r\n\r\n", 1)[1])["choices"][0]["text"]
        self._expected = self._expected or text
        if text != self._expected:
            return Failure("server", f"a good request gets {text!r}, {self._expected!r} before")
        return None


def _judge_answer(answer: bytes, protocol: bool) -> Failure | None:
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1."):
        # HTTP/0.9 has no head
        return None if protocol else Failure("server", f"no HTTP: {answer[:300]!r}")
    status = int(head[9:12])
    if status >= 500 and not (protocol and status in OTHER_STATUS):
        return Failure("server", f"status {status}: {body[:500]!r}")
    if protocol:
        return None
    if status == 200:
        if b"text/event-stream" in head and b'"error"' in body[-2000:]:
            return Failure("server", f"a stream ends with an error: {body[-500:]!r}")
        return None
    try:
        error = json.loads(body)["error"]
        message = error["message"]
    except (ValueError, KeyError, TypeError):
        return Failure("message", f"status {status} without an error object: {body[:300]!r}")
    if not isinstance(message, str) or not message or len(message) > MESSAGE:
        return Failure("message", f"a message of {len(message)} characters: {message[:200]!r}")
    if not message.isprintable() or "Traceback" in message:
        return Failure("message", f"odd message: {message[:300]!r}")
    return None
