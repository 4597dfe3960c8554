"""What a client of the server may ask for: everything is checked before anything is done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_STOPS = 16
MAX_DRAFT_TOKENS = 64
MAX_TOP_LOGPROBS = 11

DEFAULT_MODEL = "default_model"
"""mlx-lm's name for the model that the server was started with."""


class BadRequest(Exception):
    """A request that cannot be served.

    Attributes:
        status: The HTTP status to answer with.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def parse_body(raw: bytes) -> dict[str, Any]:
    """A request's body as a JSON object, without keys that are null.

    Raises:
        BadRequest: If it is not UTF-8, not JSON, no object, or holds half a character.
    """
    try:
        body = json.loads(raw.decode("utf-8"))
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest("the request is not UTF-8 text") from error
    except UnicodeEncodeError as error:
        raise BadRequest("the request holds a lone surrogate, half of a character") from error
    except RecursionError as error:
        raise BadRequest("the request is nested too deeply") from error
    except ValueError as error:
        raise BadRequest(f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the request must be a JSON object")
    return {key: value for key, value in body.items() if value is not None}


def check_request(
    body: dict[str, Any], *, chat: bool, vocab_size: int, models: frozenset[str]
) -> None:
    """Refuse what the model or mlx-lm's server cannot do; spell the rest as mlx-lm reads it.

    Args:
        body: From `parse_body`; changed in place.
        chat: Whether it asks for a chat completion rather than a text completion.
        vocab_size: Tokens that the model knows.
        models: Names that the served model goes by.

    Raises:
        BadRequest: Naming the argument, what was found and what was expected.
    """
    model = _typed(body, "model", str, DEFAULT_MODEL)
    if model not in models:
        raise BadRequest(f"model {model!r} is not served here; GET /v1/models lists what is", 404)
    for key in ("adapters", "draft_model"):
        if body.pop(key, DEFAULT_MODEL) != DEFAULT_MODEL:
            raise BadRequest(f"{key} cannot be chosen by a request")
    for key, (low, high) in _NUMBERS.items():
        _number(body, key, low, high)
    for key, (least, most) in _COUNTS.items():
        _count(body, key, least, most)
    for key in ("stream", "echo"):
        _typed(body, key, bool)
    for key, only in _ONLY.items():
        if body.pop(key, only) != only:
            raise BadRequest(f"{key} other than {json.dumps(only)} is not supported")
    if body.get("top_k", 0) >= vocab_size:
        body["top_k"] = 0  # all of them
    options = _typed(body, "stream_options", dict, {})
    if options or "stream_options" in body:
        usage = _typed(options, "include_usage", bool, False)
        body["stream_options"] = {"include_usage": usage}
    _check_logprobs(body, chat)
    _check_bias(body, vocab_size)
    _check_stop(body)
    _typed(body, "chat_template_kwargs", dict)
    _check_mapping(body, "role_mapping")
    _objects(body, "tools")
    if chat:
        _check_messages(body)
    else:
        _check_prompt(body)


_UNBOUNDED = math.inf
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 1e4),
    "presence_penalty": (-1e4, 1e4),
    "frequency_penalty": (-1e4, 1e4),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 0.5),
}
_COUNTS = {
    "max_tokens": (1, _UNBOUNDED),
    "max_completion_tokens": (1, _UNBOUNDED),
    "top_k": (0, _UNBOUNDED),
    "repetition_context_size": (0, 2**31),
    "presence_context_size": (0, 2**31),
    "frequency_context_size": (0, 2**31),
    "num_draft_tokens": (1, MAX_DRAFT_TOKENS),
    "seed": (0, 2**63 - 1),
}
_ONLY: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "response_format": {"type": "text"},
}


def _typed(body: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = body.get(key, default)
    if value is not None and not isinstance(value, kind):
        name = {bool: "true or false", str: "a string", dict: "an object", list: "a list"}[kind]
        raise BadRequest(f"{key} must be {name}, not {_shown(value)}")
    return value


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _number(body: dict[str, Any], key: str, low: float, high: float) -> None:
    value = body.get(key, low)
    if not _is_number(value) or not low <= value <= high:
        raise BadRequest(f"{key} must be a number from {low:g} to {high:g}, not {_shown(value)}")
    if key in body:
        body[key] = float(value)


def _count(body: Mapping[str, Any], key: str, least: int, most: float) -> None:
    value = body.get(key, least)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bound = "" if most == _UNBOUNDED else f" and at most {most}"
        raise BadRequest(
            f"{key} must be a whole number of at least {least}{bound}, not {_shown(value)}"
        )


def _check_logprobs(body: dict[str, Any], chat: bool) -> None:
    wanted = body.get("logprobs", False)
    if not chat and isinstance(wanted, int) and not isinstance(wanted, bool):
        # Text completions ask for a number of alternatives.
        _count(body, "logprobs", 0, MAX_TOP_LOGPROBS)
        body["logprobs"] = True
        if wanted:
            body["top_logprobs"] = wanted
    _typed(body, "logprobs", bool)
    _count(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if body.get("top_logprobs"):
        body["logprobs"] = True


def _check_bias(body: dict[str, Any], vocab_size: int) -> None:
    for token, bias in _typed(body, "logit_bias", dict, {}).items():
        if not (token.isascii() and token.isdigit()) or int(token[:12]) >= vocab_size:
            raise BadRequest(
                f"logit_bias names token {_shown(token)}; the model knows 0 to {vocab_size - 1}"
            )
        if not _is_number(bias) or abs(bias) > 1e4:
            raise BadRequest(f"logit_bias must hold numbers, not {_shown(bias)}")


def _check_stop(body: dict[str, Any]) -> None:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(text, str) and text for text in stops)
    ):
        raise BadRequest(
            f"stop must be a text or a list of at most {MAX_STOPS}, none of them empty"
        )


def _check_mapping(body: dict[str, Any], key: str) -> None:
    values = _typed(body, key, dict, {}).values()
    if not all(isinstance(value, str) for value in values):
        raise BadRequest(f"{key} must hold strings only")


def _objects(body: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    values = _typed(body, key, list, [])
    if not all(isinstance(value, dict) for value in values):
        raise BadRequest(f"{key} must be a list of objects")
    return values


def _check_messages(body: dict[str, Any]) -> None:
    messages = _objects(body, "messages")
    if not messages:
        raise BadRequest("messages must be a list of at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message.get("role"), str):
            raise BadRequest(f"{where} needs a role")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                text = isinstance(part, dict) and part.get("type") == "text"
                if not text or not isinstance(part.get("text"), str):
                    raise BadRequest(f"{where}: only text can be read")
        elif content is not None and not isinstance(content, str):
            raise BadRequest(f"{where}: content must be a text, not {_shown(content)}")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise BadRequest(f"{where}: tool_calls must be a list of objects")
        for call in calls:
            if not isinstance(call.get("function", {}), dict):
                raise BadRequest(f"{where}: a tool call's function must be an object")


def _check_prompt(body: dict[str, Any]) -> None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        body["prompt"] = prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest(f"prompt must be one text, not {_shown(prompt)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
