"""The server: every client gets its own answer, or an error that says what was wrong."""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest

from mlx_rgemma import convert, generate, load
from mlx_rgemma.checkpoints.source import EMBEDDED

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
STORY = "Lily and Tom went to the park to play with a big red ball. They saw a dog. " * 8
CLIENTS = 64


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

    def send(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, **body) -> tuple[int, dict]:
        status, raw = self.send("POST", path, json.dumps(body).encode())
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
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            time.sleep(wait_s)

    def stop(self) -> str:
        self.process.kill()
        return self.process.communicate()[1]


@pytest.fixture(scope="module")
def server():
    running = Running("--dtype", "float32", "--prompt-cache-size", "6")
    yield running
    errors = running.stop()
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def embedded():
    return load(dtype="float32")


def test_the_greeting_says_what_a_conversation_takes(server):
    assert "State: 111360 bytes a conversation, at any length; 6 kept for later turns, 0.7 MB" in (
        server.greeting
    )


def test_a_completion_is_what_generate_gives(server, embedded):
    expected = generate(*embedded, "Once upon a time", max_tokens=20)
    status, answer = server.post(COMPLETIONS, prompt="Once upon a time", max_tokens=20)
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 20)
    pieces = server.events(
        COMPLETIONS,
        prompt="Once upon a time",
        max_tokens=20,
        stream_options={"include_usage": True},
    )
    assert "".join(e["choices"][0]["text"] for e in pieces if e["choices"]) == expected
    assert pieces[-1]["usage"]["completion_tokens"] == 20


def test_logprobs_and_stop_texts(server):
    answer = server.post(COMPLETIONS, prompt="The king", max_tokens=4, logprobs=3)[1]
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for token in content:
        best = token["top_logprobs"][0]
        assert len(token["top_logprobs"]) == 3
        assert [token[key] for key in ("id", "token", "logprob")] == [*best.values()]  # greedy
        assert token["logprob"] <= 0
    plain = server.complete("The king", 30)
    word = plain.split()[5]
    choice = server.post(COMPLETIONS, prompt="The king", max_tokens=30, stop=[word])[1]["choices"][
        0
    ]
    assert choice["text"] == plain[: plain.index(word)]
    assert choice["finish_reason"] == "stop"


def test_the_model_list_names_the_model_that_requests_may_name(server):
    name = json.loads(server.send("GET", "/v1/models")[1])["data"][0]["id"]
    assert server.send("GET", f"/v1/models/{name}")[0] == 200
    assert server.send("GET", "/v1/models/other")[0] == 404
    assert server.complete("A", 2, model=name) == server.complete("A", 2)
    assert json.loads(server.send("GET", "/health")[1]) == {"status": "ok"}


def test_a_chat_reads_only_what_is_new(server):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": STORY}]
    answers = [server.post(CHAT, messages=messages, max_tokens=6)[1] for _ in range(2)]
    first, again = (a["choices"][0]["message"]["content"] for a in answers)
    assert first == again
    details = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert details[0] == 0
    assert details[1] > 100


def test_a_state_that_is_continued_gives_what_reading_anew_gives(server, embedded):
    prompt = STORY + "Then"
    text = server.complete(prompt, 12)
    status, answer = server.post(COMPLETIONS, prompt=prompt + text + " and", max_tokens=12)
    assert status == 200
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    expected = generate(*embedded, prompt + text + " and", max_tokens=12)
    assert answer["choices"][0]["text"] == expected


def test_a_prompt_that_is_known_in_full_is_answered(server):
    """Every token of it has been read: one is read again, as the model needs one to go on from."""
    text = server.complete("The little dog", 6)
    answers = {server.complete("The little dog" + text, 5) for _ in range(4)}
    assert len(answers) == 1


def test_a_seed_repeats_an_answer(server):
    asked = {"prompt": "Tom", "max_tokens": 12, "temperature": 1.0}
    first, again, other = (
        server.post(COMPLETIONS, **asked, seed=seed)[1]["choices"][0]["text"] for seed in (5, 5, 6)
    )
    assert first == again != other


BAD_FIELDS = [
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
BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b"3",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"prompt":"a","top_p":NaN}',
]


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
        connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{head}\r\n{{".encode())
        connection.shutdown(socket.SHUT_WR)
        assert int(connection.makefile("rb").readline().split()[1]) == status


def test_sixty_four_clients_at_once(server):
    """Of unequal prompts, some streaming, some leaving midway, some sending nonsense."""
    prompts = [STORY[: 5 + 9 * n] for n in range(12)]
    alone = {prompt: server.complete(prompt, 10) for prompt in prompts}
    assert len(set(alone.values())) > 6

    def client(n: int) -> tuple[str, str] | None:
        prompt, rng = prompts[n % len(prompts)], random.Random(n)
        if n % 8 == 5:
            streaming = n % 16 == 5
            wait_s = 0.3 * rng.random()
            server.leave(COMPLETIONS, wait_s, prompt=prompt, max_tokens=2000, stream=streaming)
            return None
        if n % 8 == 6:
            assert server.post(COMPLETIONS, **rng.choice(BAD_FIELDS))[0] == 400
            assert server.send("POST", COMPLETIONS, rng.choice(BAD_BODIES))[0] == 400
            return None
        if n % 8 == 7:
            events = server.events(COMPLETIONS, prompt=prompt, max_tokens=10)
            return prompt, "".join(e["choices"][0]["text"] for e in events)
        return prompt, server.complete(prompt, 10)

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for answer in pool.map(client, range(CLIENTS)) if answer is not None]
    assert len(answers) == CLIENTS * 6 // 8
    for prompt, text in answers:
        assert text == alone[prompt]
    assert server.complete(prompts[3], 10) == alone[prompts[3]]


def test_too_many_requests_are_told_so_and_those_who_leave_free_their_place():
    """Places are few, answers without end: who is not answered at once waits for them to leave."""
    running = Running("--max-requests", "2")
    try:
        with ThreadPoolExecutor(2) as pool:
            for stream in (True, False):
                endless = {"prompt": "The", "max_tokens": 10**9, "stream": stream}
                endless["logit_bias"] = {"1": -1000}  # no end of text
                leaving = [
                    pool.submit(running.leave, COMPLETIONS, 2.0, **endless) for _ in range(2)
                ]
                time.sleep(1.0)
                assert running.post(COMPLETIONS, prompt="a", max_tokens=1)[0] == 429
                for client in leaving:
                    client.result()
                statuses = []
                while statuses[-1:] != [200] and len(statuses) < 100:
                    statuses.append(running.post(COMPLETIONS, prompt="a", max_tokens=1)[0])
                    time.sleep(0.1)
                assert statuses[-1] == 200
    finally:
        errors = running.stop()
    assert "Traceback" not in errors


def test_a_draft_model_changes_no_answer(server, tmp_path):
    convert(str(EMBEDDED), str(tmp_path / "draft"), dtype="float32")
    running = Running("--dtype", "float32", "--draft-model", str(tmp_path / "draft"))
    try:
        assert running.greeting.count("222720 bytes a conversation") == 1  # two states
        for prompt in ("Once upon a time", STORY):
            expected = server.complete(prompt, 16)
            assert [running.complete(prompt, 16) for _ in range(2)] == [expected] * 2
    finally:
        errors = running.stop()
    assert "Traceback" not in errors


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


def test_the_openai_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    model = client.models.list().data[0].id
    text = client.completions.create(model=model, prompt="The king", max_tokens=8).choices[0].text
    assert text == server.complete("The king", 8)
    messages = [{"role": "user", "content": "Tell me a story."}]
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=8)
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 8
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=model, prompt="a", max_tokens=-1)
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="a")


def test_an_error_in_a_batch_ends_its_requests_and_not_the_server(monkeypatch):
    from mlx_lm import server as mlx_lm_server

    from mlx_rgemma.http_handler import Handler, Server
    from mlx_rgemma.server import build_parser
    from mlx_rgemma.serving import Generator, Provider, States

    provider = Provider(build_parser().parse_args([]))
    generator = Generator(provider, States(4), 4)
    generator.wait()
    failures, step = iter([True]), mlx_lm_server.BatchGenerator.next

    def failing_once(self):
        if next(failures, False):
            raise OSError("the graphics card has left")
        return step(self)

    monkeypatch.setattr(mlx_lm_server.BatchGenerator, "next", failing_once)
    try:
        with Server(("127.0.0.1", 0), lambda *a, **k: Handler(generator, *a, **k)) as http_server:
            Thread(target=http_server.serve_forever, daemon=True).start()
            running = Running.__new__(Running)
            running.port = http_server.server_port
            status, answer = running.post(COMPLETIONS, prompt="The", max_tokens=3)
            assert status in (500, 503)
            assert "try again" in answer["error"]["message"]
            assert running.complete("The", 3)
            assert json.loads(running.send("GET", "/health")[1]) == {"status": "ok"}
            http_server.shutdown()
    finally:
        generator.stop_and_join()
