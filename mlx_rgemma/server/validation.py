"""Validate the body of a request before it is used.

Everything that is used as an index, a size, a sampling parameter or a variable of the chat template
passes through here. `check_request` leaves only checked values in the body, in the form that
mlx-lm's server reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mlx_rgemma.errors import shown
from mlx_rgemma.io.reading import is_integer, is_number

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_DRAFT_TOKENS = 64
MAX_TOP_LOGPROBS = 11
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_VARIABLES = 16
MAX_VARIABLE_CHARS = 256
"""Bounds a role, a role prefix and a template variable: a template may repeat it per message."""
MAX_VARIABLE = 10**6
MAX_COUNT = 2**31 - 1

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
    """Return a request's body as a JSON object, without the keys whose value is null.

    Raises:
        BadRequest: If it is not UTF-8, not JSON, not an object, or holds half a character.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
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
    body: dict[str, Any],
    *,
    chat: bool,
    vocab_size: int,
    models: frozenset[str],
    reserved: frozenset[str] = frozenset(),
) -> None:
    """Refuse unsupported or invalid arguments; rewrite the others in mlx-lm's form.

    Args:
        body: From `parse_body`; changed in place.
        chat: Whether it is a chat completion rather than a text completion.
        vocab_size: Size of the vocabulary.
        models: Names of the served model.
        reserved: Names that `chat_template_kwargs` may not set, besides `RESERVED_VARIABLES`.

    Raises:
        BadRequest: Naming the argument, the value found and the values allowed.
    """
    model = _typed(body, "model", str, DEFAULT_MODEL)
    if model not in models:
        raise BadRequest(
            f"model {shown(model)} is not served here; GET /v1/models lists the served model", 404
        )
    for key in ("adapters", "draft_model"):
        if body.pop(key, DEFAULT_MODEL) != DEFAULT_MODEL:
            raise BadRequest(f"{key} cannot be chosen by a request")
    _check_unsupported(body)
    for key, (low, high) in NUMBERS.items():
        _number(body, key, low, high)
    for key, (minimum, maximum) in COUNTS.items():
        _count(body, key, minimum, maximum)
    _typed(body, "stream", bool)
    if body.get("top_k", 0) >= vocab_size:
        body["top_k"] = 0  # all tokens
    if body.get("temperature", 1.0) < MIN_TEMPERATURE:
        body["temperature"] = 0.0
    if 0 < body.get("repetition_penalty", 0.0) < MIN_PENALTY:
        raise BadRequest(f"repetition_penalty must be 0 (off) or at least {MIN_PENALTY}")
    options = _typed(body, "stream_options", dict, {})
    if "stream_options" in body:
        usage = _typed(options, "include_usage", bool, False)
        body["stream_options"] = {"include_usage": bool(usage)}
    _check_logprobs(body, chat, vocab_size)
    _check_bias(body, vocab_size)
    _check_stop(body)
    _check_variables(body, reserved)
    _check_roles(body)
    if chat:
        _check_messages(body)
    else:
        _check_prompt(body)


MIN_TEMPERATURE = 1e-5
"""Lower temperatures are greedy: logits divided by them would overflow."""
MIN_PENALTY = 0.01

NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 0.5),
}
COUNTS = {
    "max_tokens": (1, MAX_COUNT),
    "max_completion_tokens": (1, MAX_COUNT),
    "top_k": (0, MAX_COUNT),
    "repetition_context_size": (0, MAX_COUNT),
    "presence_context_size": (0, MAX_COUNT),
    "frequency_context_size": (0, MAX_COUNT),
    "num_draft_tokens": (1, MAX_DRAFT_TOKENS),
    "seed": (0, 2**63 - 1),
}
ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "", {}),
    "functions": ([],),
    "function_call": ("none", "", {}),
}
"""Arguments of OpenAI's protocol of which only these values, the defaults, are supported."""

# fmt: off
RESERVED_VARIABLES = frozenset([
    "add_generation_prompt", "add_special_tokens", "bos_token", "chat", "chat_template",
    "cls_token", "continue_final_message", "conversation", "conversations", "dict", "documents",
    "eos_token", "is_split_into_words", "kwargs", "mask_token", "max_length", "messages",
    "namespace", "pad_to_multiple_of", "pad_token", "padding", "padding_side", "raise_exception",
    "range", "sanitize_control_tokens", "self", "sep_token", "strftime_now", "stride", "text",
    "text_pair", "text_pair_target", "text_target", "tokenize", "tokenizer_kwargs", "tools",
    "truncation", "unk_token", "verbose",
])
# fmt: on
"""Names that `chat_template_kwargs` may never set: parameters of `apply_chat_template` and of a
tokenizer's call, special tokens, and functions that templates call."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _check_unsupported(body: dict[str, Any]) -> None:
    for key, allowed in ONLY.items():
        value = body.pop(key, allowed[0])
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise BadRequest(
                f"{key} must be {json.dumps(allowed[0])} or left out, not {shown(value)}:"
                " anything else is not supported"
            )


def _typed(body: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = body.get(key, default)
    if value is not None and not isinstance(value, kind):
        name = {bool: "true or false", str: "a string", dict: "an object", list: "a list"}[kind]
        raise BadRequest(f"{key} must be {name}, not {shown(value)}")
    return value


def _number(body: dict[str, Any], key: str, low: float, high: float) -> None:
    if key not in body:
        return
    if not is_number(body[key], low, high):
        raise BadRequest(f"{key} must be a number from {low:g} to {high:g}, not {shown(body[key])}")
    body[key] = float(body[key])


def _count(body: Mapping[str, Any], key: str, minimum: int, maximum: int) -> None:
    if key in body and not is_integer(body[key], minimum, maximum):
        hint = "; leave it out for the server's default" if key.startswith("max_") else ""
        raise BadRequest(
            f"{key} must be an integer from {minimum} to {maximum}, not {shown(body[key])}{hint}"
        )


def _check_logprobs(body: dict[str, Any], chat: bool, vocab_size: int) -> None:
    limit = min(MAX_TOP_LOGPROBS, vocab_size)
    wanted = body.get("logprobs", False)
    if not chat and isinstance(wanted, int) and not isinstance(wanted, bool):
        # In text completions logprobs is the number of alternatives.
        _count(body, "logprobs", 0, limit)
        body["logprobs"] = True
        if wanted:
            body["top_logprobs"] = wanted
    _typed(body, "logprobs", bool)
    _count(body, "top_logprobs", 0, limit)
    if body.get("top_logprobs"):
        body["logprobs"] = True


def _check_bias(body: dict[str, Any], vocab_size: int) -> None:
    biases = _typed(body, "logit_bias", dict, {})
    if len(biases) > MAX_BIASES:
        raise BadRequest(f"logit_bias must name at most {MAX_BIASES} tokens, not {len(biases)}")
    checked: dict[int, float] = {}
    for key, bias in biases.items():
        # MLX checks no index. The length comes first: int() of a long text is slow.
        digits = len(key) <= 12 and key.isascii() and key.isdigit()
        if not digits or int(key) >= vocab_size:
            raise BadRequest(
                f"logit_bias must name tokens from 0 to {vocab_size - 1}, not {shown(key)}"
            )
        if int(key) in checked:
            raise BadRequest(f"logit_bias names token {int(key)} twice")
        if not is_number(bias, -1e4, 1e4):
            raise BadRequest(
                f"logit_bias must hold numbers from -10000 to 10000, not {shown(bias)}"
            )
        checked[int(key)] = float(bias)
    if checked:
        body["logit_bias"] = checked
    else:
        body.pop("logit_bias", None)


def _check_stop(body: dict[str, Any]) -> None:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS for text in stops)
    ):
        raise BadRequest(
            f"stop must be a string or a list of at most {MAX_STOPS} strings, each of 1 to"
            f" {MAX_STOP_CHARS} characters"
        )


def _check_variables(body: dict[str, Any], reserved: frozenset[str]) -> None:
    variables = _typed(body, "chat_template_kwargs", dict, {})
    if len(variables) > MAX_VARIABLES:
        raise BadRequest(f"chat_template_kwargs must set at most {MAX_VARIABLES} variables")
    for name, value in variables.items():
        if (
            not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name)
            or name.startswith("return_")
            or name in RESERVED_VARIABLES | reserved
        ):
            raise BadRequest(
                f"chat_template_kwargs must set variables of the chat template, such as"
                f" enable_thinking, not {shown(name)}"
            )
        text = isinstance(value, str) and len(value) <= MAX_VARIABLE_CHARS
        number = is_number(value, -MAX_VARIABLE, MAX_VARIABLE)
        if not (value is None or isinstance(value, bool) or text or number):
            raise BadRequest(
                f"chat_template_kwargs: {name} must be true, false, null, a number up to"
                f" {MAX_VARIABLE} or a string of at most {MAX_VARIABLE_CHARS} characters,"
                f" not {shown(value)}"
            )


def _check_roles(body: dict[str, Any]) -> None:
    mapping = _typed(body, "role_mapping", dict, {})
    texts = [*mapping, *mapping.values()]
    if len(mapping) > MAX_VARIABLES or not all(
        isinstance(text, str) and len(text) <= MAX_VARIABLE_CHARS for text in texts
    ):
        raise BadRequest(
            f"role_mapping must hold at most {MAX_VARIABLES} strings of at most"
            f" {MAX_VARIABLE_CHARS} characters"
        )


def _check_messages(body: dict[str, Any]) -> None:
    messages = _typed(body, "messages", list, [])
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise BadRequest(
            f"messages must be a list of 1 to {MAX_MESSAGES} messages, not of {len(messages)}"
        )
    body["messages"] = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, str]:
    """Return the role and the text of a message; nothing else reaches the chat template."""
    if not isinstance(message, dict):
        raise BadRequest(f"{where} must be an object, not {shown(message)}")
    role = message.get("role")
    if not isinstance(role, str) or len(role) > MAX_VARIABLE_CHARS:
        raise BadRequest(f"{where} needs a role, a string such as 'user'")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise BadRequest(f"{where}: {key} are not supported")
    content = message.get("content")
    if content is None:
        content = ""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if not all(p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            raise BadRequest(f"{where}: only parts of type 'text' are supported")
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise BadRequest(f"{where}: content must be a string, not {shown(content)}")
    return {"role": role, "content": content}


def _check_prompt(body: dict[str, Any]) -> None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        body["prompt"] = prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest(
            f"prompt must be one string; tokens and several prompts are not supported,"
            f" found {shown(prompt)}"
        )
