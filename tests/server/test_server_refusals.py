"""What the server refuses: wrong requests, and starts that cannot work, each with its reason."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from helpers.running_server import BAD_BODIES, BAD_FIELDS, CHAT, COMPLETIONS, Running

pytestmark = pytest.mark.network

BAD_MESSAGES = [
    None,
    [],
    "hello",
    [3],
    [{"content": "x"}],
    [{"role": 3, "content": "x"}],
    [{"role": "user", "content": 7}],
    [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1"}}],
        }
    ],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [3]}],
]


@pytest.fixture(scope="module")
def server():
    running = Running()
    yield running
    errors = running.stop()
    assert "Traceback" not in errors


@pytest.mark.parametrize("body", BAD_FIELDS, ids=lambda body: json.dumps(body)[:60])
def test_wrong_arguments_are_named(server, body):
    status, answer = server.post(COMPLETIONS, **body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    wrong = [*body, "prompt"][1] if len(body) > 1 else "prompt"
    wrong = "stream_options" if "stream_options" in body else wrong
    assert wrong in answer["error"]["message"] or "surrogate" in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=lambda m: json.dumps(m)[:60])
def test_wrong_messages_are_refused(server, messages):
    status, answer = server.post(CHAT, messages=messages, max_tokens=2)
    assert status == 400
    assert "messages" in answer["error"]["message"]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:20]))
def test_broken_bodies_are_refused(server, body):
    status, raw = server.send("POST", COMPLETIONS, body)
    assert status == 400
    assert json.loads(raw)["error"]["message"]


def test_unknown_models_and_paths(server):
    status, answer = server.post(COMPLETIONS, prompt="a", model="gpt-4")
    assert (status, "gpt-4" in answer["error"]["message"]) == (404, True)
    assert server.post("/v1/embeddings", input="a")[0] == 404
    assert server.send("GET", "/nothing")[0] == 404


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("", 411),
        ("Content-Length: -5\r\n", 400),
        ("Content-Length: five\r\n", 400),
        ("Content-Length: 999999999999\r\n", 413),
        ("Transfer-Encoding: chunked\r\n", 411),
        ("Content-Length: 50\r\n", 400),
    ],
)
def test_lengths_that_are_wrong(server, head, status):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n{{".encode()
        )
        connection.shutdown(socket.SHUT_WR)
        assert int(connection.makefile("rb").readline().split()[1]) == status


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "nowhere-at-all"), "nowhere-at-all"),
        (("--kv-bits", "4"), "bounded already"),
        (("--host", "203.0.113.1"), "cannot listen on 203.0.113.1"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(args, message):
    result = subprocess.run(
        [sys.executable, "-m", "mlx_rgemma.server", "--port", "0", *args],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
