"""HTTP as the server speaks it, with no model behind: who is let in, errors, limits."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from threading import BoundedSemaphore, Thread
from types import SimpleNamespace

import pytest

from mlx_rgemma.server import handler as http_handler
from mlx_rgemma.server import http_server
from mlx_rgemma.server.access import Access
from mlx_rgemma.server.handler import Handler
from mlx_rgemma.server.http_server import Server

pytestmark = pytest.mark.network

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
EVIL = "https://evil.example"


@pytest.fixture
def server():
    """A server whose generator must never be asked."""
    provider = SimpleNamespace(
        name="embedded",
        names=frozenset({"default_model"}),
        model=SimpleNamespace(args=SimpleNamespace(vocab_size=2048)),
        reserved_variables=frozenset(),
    )
    generator = SimpleNamespace(is_healthy=True, model_provider=provider, slots=BoundedSemaphore(1))
    handler = lambda *a, **k: Handler(generator, *a, system_fingerprint="x", **k)  # noqa: E731
    with Server(("127.0.0.1", 0), handler) as running:
        Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


def ask(server, method: str, path: str, body=None, **headers) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, names)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def raw(server, text: bytes, *, end: bool = True) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(text)
        if end:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def error(answer: bytes, code: str | None = None) -> str:
    """Return the message of an error in OpenAI's shape."""
    found = json.loads(answer)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["type"] in ("invalid_request_error", "server_error")
    assert found["code"] == code
    assert found["message"].isprintable()
    assert len(found["message"]) < 500
    return found["message"]


@pytest.mark.parametrize("bad", [{"Origin": EVIL}, {"Origin": "null"}, {"Host": "evil.example"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/health"),
        ("GET", "/v1/models"),
        ("OPTIONS", COMPLETIONS),
        ("POST", COMPLETIONS),
        ("POST", "/nothing"),
        ("PUT", "/"),
    ],
)
def test_foreign_pages_get_nothing(server, method, path, bad):
    body = b"not even JSON" if method == "POST" else None
    status, headers, answer = ask(server, method, path, body, Content_Type="text/plain", **bad)
    assert status == 403
    assert not any(name.startswith("Access-Control") for name in headers)
    assert "may not use" in error(answer, "forbidden") or "Host" in error(answer, "forbidden")


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:5173"])
def test_pages_of_this_machine_may_read_answers(server, origin):
    for method, path, expected in (("OPTIONS", CHAT, 204), ("GET", "/v1/models", 200)):
        status, headers, _ = ask(server, method, path, Origin=origin)
        assert status == expected
        assert headers["Access-Control-Allow-Origin"] == origin
        assert headers["Vary"] == "Origin"
        assert "Authorization" in headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Origin" not in ask(server, "GET", "/v1/models")[1]


def test_keys_are_asked_for_everywhere_but_health(server):
    server.access = Access("127.0.0.1", True, frozenset({EVIL}), ("secret",))
    for method, path in (("GET", "/v1/models"), ("GET", "/"), ("POST", COMPLETIONS), ("PUT", "/")):
        for wrong in ({}, {"Authorization": "Bearer wrong"}):
            body = b"{}" if method == "POST" else None
            status, headers, answer = ask(server, method, path, body, Origin=EVIL, **wrong)
            assert status == 401
            assert headers["WWW-Authenticate"] == "Bearer"
            assert headers["Access-Control-Allow-Origin"] == EVIL  # the page may show the error
            assert "API key" in error(answer, "invalid_api_key")
    assert ask(server, "GET", "/health")[0] == 200
    assert ask(server, "OPTIONS", CHAT, Origin=EVIL)[0] == 204  # browsers send no key with it
    assert ask(server, "GET", "/v1/models", Authorization="Bearer secret")[0] == 200
    assert ask(server, "POST", COMPLETIONS, b"{}", Authorization="Bearer secret")[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "word"),
    [
        ("GET", "/nothing", 404, "/nothing"),
        ("GET", "/v1/modelsX", 404, "/v1/modelsX"),
        ("GET", "/v1/models/other", 404, "other"),
        ("POST", "/v1/embeddings", 404, "/v1/embeddings"),
        ("GET", COMPLETIONS, 405, "POST"),
        ("POST", "/v1/models", 405, "GET"),
        ("PUT", COMPLETIONS, 405, "PUT"),
        ("DELETE", "/v1/models", 405, "DELETE"),
        ("BREW", "/", 405, "BREW"),
    ],
)
def test_errors_are_json(server, method, path, status, word):
    found, headers, answer = ask(server, method, path)
    assert found == status
    assert headers["Content-type"] == "application/json"
    assert word in error(answer, "not_found" if status == 404 else None)
    assert ("Allow" in headers) == (status == 405)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_broken_requests_get_json_too(server, text, status):
    head, _, answer = raw(server, text).partition(b"\r\n\r\n")
    if head.startswith(b"HTTP"):
        assert int(head.split()[1]) == status
        error(answer)
    else:  # a request without a version is answered without a head
        error(head)


def test_the_root_says_what_there_is(server):
    status, headers, answer = ask(server, "GET", "/")
    assert status == 200
    assert COMPLETIONS in json.loads(answer)["message"]
    status, headers, answer = ask(server, "HEAD", "/health")
    assert (status, answer) == (200, b"")
    assert headers["Content-Length"] == str(len('{"status": "ok"}'))


def test_lengths_that_disagree(server):
    for lengths in ((5, 4), (2, 4096)):
        head = "".join(f"Content-Length: {length}\r\n" for length in lengths)
        start = time.perf_counter()
        request = f"POST {COMPLETIONS} HTTP/1.1\r\n{head}\r\n{{}}"
        answer = raw(server, request.encode(), end=False)
        assert time.perf_counter() - start < 10
        assert b" 400 " in answer.splitlines()[0]
        assert "Content-Length" in error(answer.partition(b"\r\n\r\n")[2])
    both = "Content-Length: 2\r\nContent-Length: 2\r\n"
    assert b"prompt" in raw(server, f"POST {COMPLETIONS} HTTP/1.1\r\n{both}\r\n{{}}".encode())
    chunked = "Content-Length: 2\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
    answer = raw(server, f"POST {COMPLETIONS} HTTP/1.1\r\n{chunked}\r\n{{}}".encode())
    assert b" 411 " in answer.splitlines()[0]


def test_large_bodies_are_refused_in_a_way_that_clients_see(server):
    for headers in ({}, {"Origin": EVIL}):
        for _ in range(5):
            body = b" " * (http_server.BODY_LIMIT + 1)
            status, _, answer = ask(server, "POST", COMPLETIONS, body, **headers)
            assert status == (403 if headers else 413)
    status, _, answer = ask(server, "POST", COMPLETIONS, b" " * 3_000_000)
    assert "2000000 bytes" in error(answer)
    assert "--max-request-bytes" in error(answer)
    server.body_limit = 10
    assert ask(server, "POST", COMPLETIONS, b" " * 11)[0] == 413


def test_a_whole_request_has_a_deadline(server, monkeypatch):
    """One byte at a time keeps neither a head nor a body open."""
    monkeypatch.setattr(http_handler, "REQUEST_TIMEOUT_S", 1.0)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n".encode()
    for text, status in ((head, b" 408 "), (b"", b"")):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
            connection.sendall(text)
            start = time.monotonic()
            answer = b""
            try:
                while time.monotonic() - start < 10:
                    connection.sendall(b"a")
                    connection.settimeout(0.2)
                    try:
                        part = connection.recv(1 << 16)
                    except TimeoutError:
                        continue
                    if not part:
                        break
                    answer += part
            except ConnectionError:
                pass
            assert time.monotonic() - start < 8
            assert status in answer


def test_there_is_a_limit_of_connections(server):
    server._places = BoundedSemaphore(2)
    address = ("127.0.0.1", server.server_port)
    idle = [socket.create_connection(address, timeout=5) for _ in range(2)]
    time.sleep(0.5)
    try:
        assert raw(server, b"", end=False).startswith(b"HTTP/1.0 503 ")
    finally:
        for connection in idle:
            connection.close()
    time.sleep(0.5)
    assert ask(server, "GET", "/health")[0] == 200


def test_the_log_escapes_control_characters(server, caplog):
    caplog.set_level(logging.INFO)
    raw(server, b"GET /x\x1b]0;owned\x07\x1b[2J\x9b\x08 HTTP/1.1\r\n\r\n")
    raw(server, b"GET /\rsecond\r\n\r\n")
    raw(server, b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n\r\n")
    assert len(caplog.messages) >= 3
    assert all(message.isprintable() and len(message) < 400 for message in caplog.messages)
    assert any("\\x1b]0;owned\\x07" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "m" * 100_000},
        {"prompt": "a", "logit_bias": {"000000000000999999999": 5}},
        {"prompt": "a", "stop": "x" * 400_000},
        {"prompt": "a", "n": True},
    ],
    ids=lambda fields: [*fields][-1],
)
def test_refused_bodies_never_reach_the_generator(server, fields):
    status, _, answer = ask(server, "POST", COMPLETIONS, json.dumps(fields).encode())
    assert status == (404 if "model" in fields else 400)
    error(answer, "not_found" if status == 404 else None)
