"""The server: every client gets its own answer, or an error that says what was wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
from helpers.running_server import BAD_BODIES, BAD_FIELDS, CHAT, COMPLETIONS, STORY, Running

from mlx_rgemma import convert, generate, load
from mlx_rgemma.io.hub import EMBEDDED

pytestmark = [pytest.mark.slow, pytest.mark.network]

CLIENTS = 64


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
    assert (
        "State: 111360 bytes per conversation, at any length; 6 kept for later turns, 0.7 MB"
        in (server.greeting)
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


def test_too_many_requests_get_an_error_and_disconnected_clients_free_their_place():
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
        assert running.greeting.count("222720 bytes per conversation") == 1  # two states
        for prompt in ("Once upon a time", STORY):
            expected = server.complete(prompt, 16)
            assert [running.complete(prompt, 16) for _ in range(2)] == [expected] * 2
    finally:
        errors = running.stop()
    assert "Traceback" not in errors


def test_the_chat_client_of_the_examples(server):
    script = Path(__file__).parents[2] / "examples" / "chat_client.py"
    messages = [{"role": "user", "content": "Tell me a story."}]
    expected = server.post(CHAT, messages=messages, max_tokens=8)[1]["choices"][0]["message"]
    url = f"http://127.0.0.1:{server.port}/v1"
    result = subprocess.run(
        [sys.executable, str(script), "--max-tokens", "8", "--url", url],
        input="Tell me a story.\n\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"> {expected['content']}\n> "


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

    from mlx_rgemma.server.command import build_parser
    from mlx_rgemma.server.engine import Generator, Provider
    from mlx_rgemma.server.handler import Handler
    from mlx_rgemma.server.http_server import Server
    from mlx_rgemma.server.states import PromptCacheStore

    provider = Provider(build_parser().parse_args([]))
    generator = Generator(provider, PromptCacheStore(4), 4)
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
