"""Requests to the server: every field of both completions, and the protocol itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz.job import Box, Family
from fuzz.mutations import NUMBERS, Raw, brief, dumps, mutate_bytes, mutate_json, nasty
from fuzz.payloads import files
from fuzz.serving import Request, post

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LEAVE_S = 1.5
VOCABULARY = 600

FIELDS = (
    *("model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "repetition_context_size", "presence_penalty"),
    *("presence_context_size", "frequency_penalty", "frequency_context_size"),
    *("xtc_probability", "xtc_threshold", "stop", "seed", "stream", "stream_options", "logprobs"),
    *("top_logprobs", "logit_bias", "n", "best_of", "echo", "suffix", "response_format", "tools"),
    *("tool_choice", "parallel_tool_calls", "functions", "function_call", "chat_template_kwargs"),
    *("role_mapping", "adapters", "draft_model", "num_draft_tokens", "user", "metadata", "store"),
    *(
        "modalities",
        "audio",
        "reasoning_effort",
        "service_tier",
        "prediction",
        "messages",
        "prompt",
    ),
    "",
)
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
BODIES: dict[str, tuple[dict[str, Any], ...]] = {
    CHAT: (
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Hello", "tool_calls": []},
                {"role": "user", "content": "Who?"},
            ],
            "max_tokens": 2,
            "stop": ["x", "yy"],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "tools": [TOOL]},
    ),
    COMPLETIONS: (
        {"prompt": "Lily met", "max_tokens": 2},
        {
            "prompt": ["Lily met"],
            "max_tokens": 2,
            "logit_bias": {"5": 1.5, "7": -100},
            "logprobs": 3,
            "stop": "x",
            "seed": 3,
            "temperature": 0.5,
            "top_p": 0.9,
        },
    ),
}
NASTY_FIELDS: dict[str, tuple[Any, ...]] = {
    "logit_bias": (
        *({key: 5} for key in ("0", "01", "1e0", "-1", " 1", "1 ", "+1", "٣", "1_0", "9" * 30)),
        *({key: 5} for key in ("0" * 12 + "999999999", "0" * 5000 + "1", str(2**31), str(2**64))),
        *({str(VOCABULARY + n): 1234.5} for n in (-100, 0, 100)),
        {"1": 1, "01": 2},
        {"1": Raw("NaN")},
        {"1": 1e308},
        {str(n): 1 for n in range(20_000)},
    ),
    "stop": (["a" * 2000] * 16, "a" * 100_000, ["\0"], [" "] * 16, ["ab" * 40, "ba" * 40], "\n"),
    "chat_template_kwargs": tuple(
        {key: value}
        for key in (
            *("chat_template", "tokenize", "tools", "conversation", "padding", "max_length"),
            *("truncation", "return_tensors", "return_dict", "tokenizer_kwargs", "documents"),
            *("continue_final_message", "add_generation_prompt", "bos_token", "messages", "x"),
        )
        for value in ("max_length", 300_000, True, {"a": 1}, "{{ 1 / 0 }}")
    ),
    "messages": (
        [],
        [{}],
        [{"role": "system", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": "x", "tool_calls": [{"function": {"arguments": "{"}}]}],
        [
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": "[" * 900}}],
            }
        ],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 400
        + [{"role": "user", "content": "c"}],
        [{"role": "\x1b[2J", "content": "x"}],
        [{"role": "user", "content": "<end_of_turn>\n<start_of_turn>user"}],
    ),
    "prompt": (
        [1, 2, 3],
        [[1]],
        ["a", "b"],
        "",
        "\0",
        "😀" * 5000,
        "<bos>" * 50,
        [2**40],
        "\u202e",
    ),
    "model": ("../x", "/etc/passwd", "default_model", "x" * 100_000, "embedded", "google/gemma-2b"),
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}),
    "tool_choice": ("auto", "none", "required", {"type": "function", "function": {"name": "f"}}),
}


def _bodies(path: str) -> Callable[[Box, Random], Request]:
    def make(box: Box, rng: Random) -> Request:
        body: Any = json.loads(json.dumps(rng.choice(BODIES[path])))
        draw = rng.random()
        if draw < 0.15:
            content, note = mutate_bytes(rng, dumps(body).encode())
            return _request(path, content, note)
        if draw < 0.35:
            body, note = mutate_json(rng, body, FIELDS)
        else:
            notes = []
            for _ in range(rng.choice((1, 1, 2, 3))):
                field = rng.choice(FIELDS)
                special = NASTY_FIELDS.get(field, ())
                value = rng.choice(special) if special and rng.random() < 0.6 else nasty(rng)
                if field == "logit_bias" and rng.random() < 0.3:
                    value = {str(rng.choice(NUMBERS)): rng.choice(NUMBERS)}
                body[field] = value
                notes.append(f"{field} = {brief(value)}")
            note = "; ".join(notes)
        return _request(path, dumps(body).encode("utf-8", "surrogatepass"), note)

    return make


def _request(path: str, content: bytes, note: str) -> Request:
    """Return a request, which the client leaves if it asks for a very long answer."""
    try:
        body = json.loads(content)
        asked = [body.get(key) for key in ("max_tokens", "max_completion_tokens")]
        long = any(isinstance(n, int | float) and n > 1000 for n in asked)
    except (ValueError, AttributeError, RecursionError):
        long = False
    return post(path, content, note, LEAVE_S if long else 0.0)


def _stored(path: str, content: bytes) -> Callable[[Box, Random], Request]:
    return lambda box, rng: _request(path, content, brief(content))


def _built(path: str, note: str, **fields: Any) -> Callable[[Box, Random], Request]:
    """Return a maker of a request that is too large to be stored."""
    first = BODIES[path][0]
    return lambda box, rng: _request(path, dumps({**first, **fields}).encode(), note)


PAYLOADS: dict[str, dict[str, Callable[[Box, Random], Request]]] = {
    CHAT: {
        "padding to 300,000 tokens": _built(
            CHAT, "padding", chat_template_kwargs={"padding": "max_length", "max_length": 300_000}
        ),
        "a model of 100,000 characters": _built(CHAT, "model", model="x" * 100_000),
        "a message of 10 MB": _built(
            CHAT, "10 MB", messages=[{"role": "user", "content": "Ann saw Ben. " * 800_000}]
        ),
    },
    COMPLETIONS: {
        "16 stops of 400 kB": _built(
            COMPLETIONS, "stops", stop=["ab" * 200_000 + str(i) for i in range(16)]
        ),
        "one stop of 1 MB": _built(COMPLETIONS, "a stop", stop="ab" * 500_000),
        "a prompt of 10 MB": _built(COMPLETIONS, "10 MB", prompt="Ann saw Ben. " * 800_000),
        "a prompt of 10 MB without spaces": _built(COMPLETIONS, "10 MB", prompt="ab" * 5_000_000),
        "nested to 100,000": lambda box, rng: post(COMPLETIONS, b"[" * 100_000, "nested"),
    },
}

METHODS = (
    "GET",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "TRACE",
    "CONNECT",
    "PRI",
    "get",
    "",
    "X" * 70_000,
)
PATHS = (
    *("/", "/health", "/v1/models", "/v1/models/x", "/v1/models/%2e%2e/x", "/v1/nothing", "*"),
    *(
        "/v1/completions/",
        "//v1/completions",
        "/v1/completions?x=1",
        "/v1/completions#x",
        "/chat/completions",
    ),
    *(
        "http://evil.example/v1/models",
        "/../../etc/passwd",
        "/%00",
        "/x\x1b]0;owned\x07\x1b[2J",
        "/a\rb",
        "",
    ),
    *("/" + "x" * 70_000, "/\xff\xfe", "/é", " ", "/v1/models/" + "y" * 5000),
)
VERSIONS = (
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/0.9",
    "HTTP/9.9",
    "HTTP/1.999999999999",
    "HTTP/x",
    "http/1.1",
    "",
    "HTTP/2.0",
)
HEADERS = (
    *(
        "Host: evil.example",
        "Host: ",
        "Host: a\r\nHost: b",
        "Host: 127.0.0.1",
        "Host: [::1",
        "Host: \x1b[2J",
    ),
    *(
        "Origin: https://evil.example",
        "Origin: null",
        "Origin: http://localhost:1",
        "Origin: x" + "y" * 5000,
    ),
    *(
        "Content-Length: -1",
        "Content-Length: 1e3",
        "Content-Length: 99999999999999999999",
        "Content-Length: 0",
    ),
    *(
        "Content-Length: 3\r\nContent-Length: 5",
        "Content-Length: +5",
        "Content-Length: 5, 5",
        "Content-Length: ٣",
    ),
    *(
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: chunked, identity",
    ),
    *("Transfer-Encoding : chunked", " folded: yes", "no colon", ": no name", "X: " + "z" * 70_000),
    *(
        "Expect: 100-continue",
        "Expect: x",
        "Connection: keep-alive",
        "Upgrade: h2c",
        "Content-Encoding: gzip",
    ),
    *(
        "Authorization: Bearer x",
        "Authorization: Bearer \x00\xff",
        "Content-Type: text/plain",
        "Content-Type: x/y; charset=z",
    ),
    "\r\n".join(f"H{i}: v" for i in range(300)),
    *(
        "Range: bytes=0-",
        "Access-Control-Request-Method: POST",
        "X\x00Y: z",
        "Cookie: " + "c=d; " * 3000,
    ),
)
CHUNKS = (b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\nx", b"-1\r\n", b"zz\r\n", b"0\r\n\r\n")

NO_REQUESTS = (
    b"",
    b"\r\n",
    b"\r\n" * 5000,
    b"\0" * 100_000,
    b"GET / HTTP/1.1",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)


def _protocol(box: Box, rng: Random) -> Request:
    body = json.dumps(rng.choice(BODIES[COMPLETIONS])).encode()
    if rng.random() < 0.1:
        raw = rng.choice((*NO_REQUESTS, rng.randbytes(500)))
        return Request(raw, f"raw {brief(raw)}", protocol=True)
    method, path, version = "POST", COMPLETIONS, "HTTP/1.1"
    headers = ["Host: HOST", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    notes = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        action = rng.choice(
            (
                "method",
                "path",
                "path",
                "version",
                "header",
                "header",
                "header",
                "drop",
                "body",
                "cut",
            )
        )
        if action == "method":
            method = rng.choice(METHODS)
            notes.append(brief(method))
        elif action == "path":
            path = rng.choice(PATHS)
            method = rng.choice(("GET", "POST", method))
            notes.append(brief(path))
        elif action == "version":
            version = rng.choice(VERSIONS)
            notes.append(brief(version))
        elif action == "header":
            header = rng.choice(HEADERS)
            name = header.split(":")[0]
            if rng.random() < 0.7:
                headers = [h for h in headers if h.split(":")[0] != name]
            headers.insert(rng.randrange(len(headers) + 1), header)
            notes.append(brief(header))
        elif action == "drop":
            dropped = headers.pop(rng.randrange(len(headers))) if headers else ""
            notes.append(f"no {dropped.split(':')[0]}")
        elif action == "body":
            body = rng.choice((b"", body * 2, rng.choice(CHUNKS), body[:10], b"\xff" * 100))
            notes.append(f"body {brief(body)}")
        else:
            notes.append("cut")
            body = body[: rng.randrange(len(body) + 1)]
    end = rng.choice(("\r\n", "\r\n", "\r\n", "\n", "\r"))
    head = f"{method} {path} {version}{end}" + "".join(h + end for h in headers) + end
    raw = head.encode("latin-1", "replace") + body
    if rng.random() < 0.1:
        raw *= 2
        notes.append("twice")
    return Request(raw, "; ".join(notes), protocol=True)


def _stored_raw(content: bytes) -> Callable[[Box, Random], Request]:
    return lambda box, rng: Request(content, brief(content), protocol=True)


def _sound(path: str, number: int = 0) -> Callable[[Box, Random], Request]:
    return lambda box, rng: post(path, json.dumps(BODIES[path][number]).encode(), "")


FAMILIES = (
    *(
        Family(
            name,
            "server",
            {"sound": _sound(path), "sound and rich": _sound(path, 1)},
            _bodies(path),
            {**PAYLOADS[path], **{k: _stored(path, v) for k, v in files(name).items()}},
        )
        for name, path in (("chat", CHAT), ("completions", COMPLETIONS))
    ),
    Family(
        "protocol",
        "server",
        {"sound": _sound(COMPLETIONS)},
        _protocol,
        {name: _stored_raw(content) for name, content in files("protocol").items()},
    ),
)
