"""A server in a process of its own, and what clients may send it."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
STORY = "Lily and Tom went to the park to play with a big red ball. They saw a dog. " * 8

BAD_FIELDS: list[dict[str, Any]] = [
    {},
    {"prompt": 3},
    {"prompt": ["a", "b"]},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": 0},
    {"prompt": "a", "max_tokens": "many"},
    {"prompt": "a", "max_tokens": True},
    {"prompt": "a", "max_completion_tokens": 1.5},
    {"prompt": "a", "temperature": "hot"},
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "top_p": 2},
    {"prompt": "a", "top_k": -3},
    {"prompt": "a", "min_p": []},
    {"prompt": "a", "xtc_threshold": 0.9},
    {"prompt": "a", "stream": "yes"},
    {"prompt": "a", "stream": True, "stream_options": 7},
    {"prompt": "a", "stop": [""]},
    {"prompt": "a", "stop": 3},
    {"prompt": "a", "stop": ["x"] * 17},
    {"prompt": "a", "logprobs": "all"},
    {"prompt": "a", "top_logprobs": 500},
    {"prompt": "a", "logit_bias": {"99999": 1}},
    {"prompt": "a", "logit_bias": {"x": 1}},
    {"prompt": "a", "logit_bias": {"3": "1"}},
    {"prompt": "a", "n": 2},
    {"prompt": "a", "seed": 2**70},
    {"prompt": "a", "seed": -1},
    {"prompt": "a", "adapters": "/etc"},
    {"prompt": "a", "draft_model": "other"},
    {"prompt": "a\ud800"},
]
BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b"3",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"prompt":"a","top_p":NaN}',
]


class Running:
    """A server in a process of its own, on a free port."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlx_rgemma.server",
                "--port",
                "0",
                "--log-level",
                "ERROR",
                *args,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.greeting = ""
        while "Serving at" not in self.greeting:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.greeting += line
        self.port = int(self.greeting.rsplit(":", 1)[1].split("/")[0])

    def send(
        self, method: str, path: str, body: bytes | None = None, key: str = ""
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, key: str = "", **body) -> tuple[int, dict]:
        status, raw = self.send("POST", path, json.dumps(body).encode(), key)
        return status, json.loads(raw)

    def complete(self, prompt: str, max_tokens: int, **body) -> str:
        status, answer = self.post(COMPLETIONS, prompt=prompt, max_tokens=max_tokens, **body)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def events(self, path: str, **body) -> list[dict]:
        """The events of a streamed answer, which ends as it should."""
        status, raw = self.send("POST", path, json.dumps({**body, "stream": True}).encode())
        assert status == 200, raw
        lines = [line for line in raw.decode().splitlines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]

    def leave(self, path: str, wait_s: float, **body) -> None:
        """Ask, and hang up without having read the answer."""
        raw = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            time.sleep(wait_s)

    def stop(self) -> str:
        self.process.kill()
        return self.process.communicate()[1]
