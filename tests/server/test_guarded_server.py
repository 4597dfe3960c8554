"""A server with API keys and a chat template: what one client can learn of or do to another."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from threading import Thread

import pytest
from helpers.running_server import CHAT, COMPLETIONS, STORY, Running

from mlx_rgemma.server.access import Access
from mlx_rgemma.server.engine import MAX_STATE_MACHINES, Generator, Provider, _warn
from mlx_rgemma.server.states import Prompt, PromptCacheStore

pytestmark = pytest.mark.network

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.role }}: {{ m.content | trim }}\n"
    "{% endfor %}{{ greeting }}{% if add_generation_prompt %}assistant:{% endif %}"
)
USER = {"role": "user", "content": STORY}


@pytest.fixture(scope="module")
def server():
    keys = ("--api-key", "one", "--api-key", "two")
    running = Running(*keys, "--chat-template", TEMPLATE, "--log-level", "INFO")
    yield running
    errors = running.stop()
    assert "Traceback" not in errors
    assert "Prompt cache: " in errors and " MB\n" in errors and " GB" not in errors


def cached(server, path: str, key: str, **body) -> int:
    status, answer = server.post(path, key, max_tokens=4, **body)
    assert status == 200, answer
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_states_are_not_shared_between_keys(server):
    for path, body in ((COMPLETIONS, {"prompt": STORY}), (CHAT, {"messages": [USER]})):
        assert cached(server, path, "one", **body) == 0
        assert cached(server, path, "two", **body) == 0
        assert cached(server, path, "one", **body) > 100
        assert cached(server, path, "two", **body) > 100


def test_states_of_requests_that_are_served_one_by_one(server):
    asked = {"max_tokens": 4, "seed": 3}
    answer = server.post(COMPLETIONS, "one", prompt="Seeded. " + STORY + "Then", **asked)[1]
    longer = "Seeded. " + STORY + "Then" + answer["choices"][0]["text"] + " and"
    assert cached(server, COMPLETIONS, "two", prompt=longer, seed=3) == 0
    assert cached(server, COMPLETIONS, "one", prompt=longer, seed=3) > 100


def test_states_are_not_shared_in_a_common_batch(server):
    found = {}

    def client(key: str, n: int) -> None:
        prompt = f"{n} {STORY}"
        found[key, n] = [cached(server, COMPLETIONS, key, prompt=prompt) for _ in range(2)]

    for n in range(3):
        threads = [Thread(target=client, args=(key, n)) for key in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(first == 0 < second for first, second in found.values())
    assert len(found) == 6


def test_without_a_key(server):
    assert server.post(COMPLETIONS, prompt="a")[0] == 401
    assert server.post(COMPLETIONS, "three", prompt="a")[0] == 401
    assert server.send("GET", "/health") == (200, b'{"status": "ok"}')


def test_messages_that_the_template_refuses(server):
    system = [{"role": "system", "content": "x"}, USER]
    for stream in (False, True):
        status, answer = server.post(CHAT, "one", messages=system, stream=stream)
        assert status == 400
        assert answer["error"]["message"] == (
            "the chat template refuses the messages: System role not supported"
        )
        assert answer["error"]["type"] == "invalid_request_error"


def test_template_variables_of_a_request(server):
    loops = "{% for i in range(3000) %}{% for j in range(99999) %}{% endfor %}{% endfor %}a"
    for variables in (
        {"chat_template": loops},
        {"padding": "max_length", "max_length": 300_000},
        {"stride": 1},
        {"sanitize_control_tokens": True},
    ):
        start = time.perf_counter()
        status, answer = server.post(CHAT, "one", messages=[USER], chat_template_kwargs=variables)
        assert status == 400
        assert "chat_template_kwargs" in answer["error"]["message"]
        assert time.perf_counter() - start < 5

    def tokens(**variables) -> int:
        asked = {"messages": [USER], "max_tokens": 1, "chat_template_kwargs": variables}
        return server.post(CHAT, "one", **asked)[1]["usage"]["prompt_tokens"]

    assert tokens(greeting="Hello there, ") > tokens() == tokens(enable_thinking=False)


def test_stops_delay_no_other_request_and_take_little_memory(server):
    def memory_mb() -> float:
        with open(f"/proc/{server.process.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    server.post(COMPLETIONS, "one", prompt="a", max_tokens=1)
    before = memory_mb() if os.path.exists("/proc") else 0
    for n in range(2 * MAX_STATE_MACHINES):
        stop = [f"{n} {i} " + chr(97 + i) * 240 for i in range(16)]
        start = time.perf_counter()
        assert server.post(COMPLETIONS, "one", prompt="a", max_tokens=1, stop=stop)[0] == 200
        assert time.perf_counter() - start < 5
    long = ["x" * 400_000 + str(i) for i in range(4)]
    assert server.post(COMPLETIONS, "one", prompt="a", stop=long)[0] == 400
    if before:
        assert memory_mb() - before < 100


def test_automata_of_stops_are_few():
    generator = Generator.__new__(Generator)
    generator._state_machine_cache = {}
    from mlx_rgemma import load

    tokenizer = load(dtype="float32")[1]
    for n in range(3 * MAX_STATE_MACHINES):
        generator._make_state_machine("model", tokenizer, [f"stop {n}"])
        assert len(generator._state_machine_cache) <= MAX_STATE_MACHINES


def test_states_without_a_client_are_neither_kept_nor_found():
    from mlx_rgemma import load

    model = load(dtype="float32")[0]
    states = PromptCacheStore(4)
    for tokens in ([1, 2, 3], Prompt([1, 2, 3], None)):
        states.insert_cache("model", tokens, model.make_cache())
        assert len(states) == 0
    states.insert_cache("model", Prompt([1, 2], 0), model.make_cache())
    assert states.fetch_nearest_cache("model", Prompt([1, 2, 3], 0))[0] is not None
    for tokens in ([1, 2, 3], Prompt([1, 2, 3], None), Prompt([1, 2, 3], 1)):
        assert states.fetch_nearest_cache("model", tokens) == (None, tokens)
    assert Prompt([1, 2, 3], 7)[1:].client == Prompt([1], 7)[:].client == 7


def test_a_server_for_everybody_says_so(capsys):
    _warn(Access("127.0.0.1", True), "http://127.0.0.1:1")
    assert capsys.readouterr().err == ""
    _warn(Access("0.0.0.0", False, keys=("a",)), "http://0.0.0.0:1")
    with_key = capsys.readouterr().err
    _warn(Access("0.0.0.0", False), "http://0.0.0.0:1")
    without = capsys.readouterr().err
    for text in (with_key, without):
        assert text.startswith("warning: http://0.0.0.0:1")
        assert text.count("\n") == 1
    assert "--api-key" in without and "--api-key" not in with_key


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_open_streams_in_order(number):
    running = Running()
    body = {"prompt": "The", "max_tokens": 10**9, "stream": True, "logit_bias": {"1": -1000}}
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
        connection.sendall(f"{head}\r\n".encode() + raw)
        received = b""
        while received.count(b"data: ") < 3:
            received += connection.recv(1 << 16)
        os.kill(running.process.pid, number)
        start = time.monotonic()
        while part := connection.recv(1 << 16):
            received += part
    events = received.decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert running.process.wait(30) == (130 if number == signal.SIGINT else 0)
    assert time.monotonic() - start < 20
    assert "Traceback" not in running.process.communicate()[1]


@pytest.mark.parametrize(
    "args",
    [
        ("--port", "70000"),
        ("--port", "-1"),
        ("--port", "1" * 5000),
        ("--prompt-cache-bytes", "1e400"),
        ("--prompt-cache-bytes", "nan"),
        ("--prompt-cache-bytes", "5MGB"),
        ("--prompt-cache-bytes", "-1"),
        ("--max-request-bytes", "1e400"),
        ("--max-requests", "99999999999999999999"),
        ("--max-tokens", "0"),
        ("--top-k", "1e3"),
        ("--temp", "inf"),
        ("--temp", "nan"),
        ("--chat-template-args", "[" * 100_000),
        ("--api-key", ""),
        ("--api-key", "hush a secret"),
    ],
    ids=lambda args: f"{args[0]} {args[1][:20]}",
)
def test_arguments_that_are_out_of_range(args, capsys):
    from mlx_rgemma.server.command import build_parser

    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(args)
    assert caught.value.code == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert args[0] in problem
    assert "secret" not in problem


def test_the_command_ends_with_one_line_for_a_wrong_port():
    command = [sys.executable, "-m", "mlx_rgemma.server", "--port", "70000"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "--port: 70000 is not at most 65535" in result.stderr.splitlines()[-1]


def test_parameters_of_the_tokenizer_are_reserved():
    args = {"model": None, "chat_template": "", "use_default_chat_template": False, "top_k": 9999}
    args |= {"dtype": "float32", "adapter_path": None, "draft_model": None}
    args |= {"trust_remote_code": False, "pipeline": False}
    provider = Provider(Namespace(**args))
    provider.load_default()
    assert {"chat_template", "padding", "stride", "bos_token"} <= provider.reserved_variables
    assert "enable_thinking" not in provider.reserved_variables
    assert provider.cli_args.top_k == 0
