"""Every field of a request is checked before it is used."""

from __future__ import annotations

import json
import math
import time

import pytest

from mlx_rgemma.server.validation import (
    COUNTS,
    MAX_BIASES,
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    NUMBERS,
    BadRequest,
    check_request,
    parse_body,
)

VOCAB = 2048


def checked(chat: bool = False, **fields) -> dict:
    """Return the body that mlx-lm's server gets, after its way through JSON."""
    prompt = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    body = parse_body(json.dumps({**prompt, **fields}).encode())
    check_request(
        body,
        chat=chat,
        vocab_size=VOCAB,
        models=frozenset({"default_model"}),
        reserved=frozenset({"new_parameter"}),
    )
    return json.loads(json.dumps(body))


def refusal(chat: bool = False, **fields) -> str:
    with pytest.raises(BadRequest) as caught:
        checked(chat, **fields)
    message = str(caught.value)
    assert len(message) < 400
    assert message.isprintable()
    return message


INTEGERS = {
    **COUNTS,
    "n": (1, 1),
    "best_of": (1, 1),
    "logprobs": (0, 11),
    "top_logprobs": (0, 11),
}
FIELDS = {**INTEGERS, **NUMBERS}
NEVER = [True, False, "1", "", [], [1], {}, {"a": 1}, math.nan, math.inf, -math.inf]
HUGE = [2**31, 2**32, 2**63, 2**64, 10**30, 10**400, -(2**31) - 1, -(2**63) - 1, -(10**400), 1e308]


def wrong_values(field: str) -> list:
    low, high = FIELDS[field]
    values = [*NEVER, *(value for value in HUGE if not low <= value <= high), low - 1, high + 1]
    if field in INTEGERS:
        values += [1.0, 1.5, -1.0, 1e3]
    if field == "logprobs":
        values.remove(True)  # as in chat completions
        values.remove(False)
    return values


WRONG = [(field, value) for field in FIELDS for value in wrong_values(field)]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda v: str(v)[:24])
def test_numbers_out_of_range_are_refused(field, value):
    message = refusal(**{field: value})
    assert field in message or "not a number of JSON" in message


@pytest.mark.parametrize("field", FIELDS)
def test_numbers_at_their_bounds_are_taken(field):
    for value in FIELDS[field]:
        body = checked(**{field: value})
        if field in NUMBERS:
            assert type(body[field]) is float


def test_numbers_that_overflow_in_the_sampler():
    assert checked(temperature=5e-324)["temperature"] == 0
    assert "repetition_penalty" in refusal(repetition_penalty=5e-324)
    assert checked(top_k=VOCAB)["top_k"] == 0


@pytest.mark.parametrize(
    "key",
    [
        "000000000000999999999",
        "0000000000002100",
        "0000000000000001",
        "2048",
        "-1",
        "+1",
        "1.0",
        " 1",
        "1 ",
        "1_0",
        "0x1",
        "\u0661",
        "²",
        "",
        "9" * 5000,
        "1" * 100_000,
    ],
    ids=lambda key: repr(key)[:20],
)
def test_a_bias_of_a_token_that_the_model_does_not_have(key):
    start = time.perf_counter()
    assert "logit_bias must name tokens from 0 to 2047" in refusal(logit_bias={key: 5})
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("bias", [*NEVER, None, 10001, -10001, 1e308, 10**400])
def test_a_bias_that_is_no_number(bias):
    message = refusal(logit_bias={"1": bias})
    assert "logit_bias" in message or "not a number of JSON" in message


def test_biases_are_passed_on_as_integers_and_once():
    assert checked(logit_bias={"007": 1, "2047": -2.5})["logit_bias"] == {"7": 1.0, "2047": -2.5}
    assert "token 1 twice" in refusal(logit_bias={"1": 1, "01": 2})
    assert str(MAX_BIASES) in refusal(logit_bias={str(i): 1 for i in range(MAX_BIASES + 1)})
    assert "logit_bias" not in checked(logit_bias={})


@pytest.mark.parametrize(
    "stop", ["x" * (MAX_STOP_CHARS + 1), ["x", "y" * 400_000], ["x"] * (MAX_STOPS + 1), [1], [""]]
)
def test_stops_are_few_and_short(stop):
    message = refusal(stop=stop)
    assert str(MAX_STOPS) in message
    assert str(MAX_STOP_CHARS) in message


def test_the_longest_stops_are_taken():
    stop = [chr(97 + i) * MAX_STOP_CHARS for i in range(MAX_STOPS)]
    assert checked(stop=stop)["stop"] == stop


@pytest.mark.parametrize(
    "name",
    [
        "chat_template",
        "tokenize",
        "tools",
        "conversation",
        "messages",
        "padding",
        "max_length",
        "truncation",
        "return_tensors",
        "return_anything",
        "tokenizer_kwargs",
        "continue_final_message",
        "add_generation_prompt",
        "documents",
        "bos_token",
        "pad_token",
        "raise_exception",
        "range",
        "new_parameter",
        "__class__",
        "Upper",
        "a b",
        "a" * 65,
        "",
    ],
)
def test_template_variables_are_no_parameters(name):
    assert "chat_template_kwargs" in refusal(True, chat_template_kwargs={name: True})


@pytest.mark.parametrize(
    "value", [[], {}, ["x"], {"a": 1}, "x" * 257, 10**7, 1e300, math.nan], ids=lambda v: str(v)[:9]
)
def test_template_variables_are_small_scalars(value):
    message = refusal(True, chat_template_kwargs={"enable_thinking": value})
    assert "enable_thinking" in message or "not a number of JSON" in message


def test_template_variables_are_passed_on():
    variables = {"enable_thinking": False, "language": "French", "level": 2, "nothing": None}
    assert checked(True, chat_template_kwargs=variables)["chat_template_kwargs"] == variables
    many = {f"v{i}": 1 for i in range(17)}
    assert "at most 16" in refusal(True, chat_template_kwargs=many)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tools", {}),
        ("tool_choice", "auto"),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("response_format", {"type": "json_object"}),
        ("n", 2),
        ("n", True),
        ("n", 1.0),
        ("echo", True),
        ("echo", 0),
        ("suffix", "x"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(field, value):
    assert refusal(True, **{field: value}).startswith(field)


def test_their_defaults_are_taken():
    defaults = {
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "n": 1,
        "echo": False,
        "response_format": {"type": "text"},
    }
    assert set(checked(True, **defaults)) == {"messages"}
    assert set(checked(True, **dict.fromkeys(defaults))) == {"messages"}


def test_only_role_and_text_of_a_message_reach_the_template():
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    messages = [
        {"role": "user", "content": "a", "name": "x", "tool_calls": []},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": None},
    ]
    assert checked(True, messages=messages)["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "function_call": {"name": "f"}},
        {"role": "x" * 257, "content": "a"},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
    ],
)
def test_messages_that_cannot_be_rendered(message):
    assert "messages[0]" in refusal(True, messages=[message])


def test_what_a_template_repeats_is_bounded():
    message = {"role": "user", "content": "a"}
    assert str(MAX_MESSAGES) in refusal(True, messages=[message] * (MAX_MESSAGES + 1))
    for mapping in ({"user": "x" * 257}, {"x" * 257: "a"}, {str(i): "" for i in range(17)}):
        assert "role_mapping" in refusal(True, role_mapping=mapping)


def test_messages_quote_values_in_part():
    for fields in (
        {"model": "m" * 100_000},
        {"model": "\x1b]0;owned\x07\r\n\x9b"},
        {"temperature": "x" * 100_000},
        {"prompt": [list(range(100_000))]},
        {"prompt": ["a" * 100_000, "b"]},
        {"tools": ["x" * 100_000]},
    ):
        refusal(**fields)
