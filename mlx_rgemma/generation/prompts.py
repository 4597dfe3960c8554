"""Encode prompts (texts, token ids or chat messages) as checked token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.griffin.checks import refuse_forked_process
from mlx_rgemma.io.reading import reason

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | mx.array
"""A text, used verbatim; token ids; or chat messages, for the chat template."""

EXPECTED = "expected a text, token ids, or a list of chat messages"


def encode_prompt(tokenizer: Any, prompt: Prompt, vocab_size: int) -> mx.array:
    """Return the token ids of a prompt, (L,) int32; chat messages go through the chat template.

    Raises:
        UserError: If messages are malformed or there is no chat template for them, and as
            `encode` does.
    """
    if isinstance(prompt, Mapping):
        raise UserError("the prompt is a single chat message: put it in a list.")
    if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
        prompt = _messages_text(tokenizer, prompt)
    return encode(tokenizer, prompt, vocab_size)


def encode(tokenizer: Any, prompt: Prompt, vocab_size: int) -> mx.array:
    """Return the token ids of a text or of token ids, (L,) int32.

    A text gets a BOS token unless it starts with one.

    Raises:
        UserError: If the prompt is empty or holds an unknown token.
    """
    refuse_forked_process()
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    if isinstance(prompt, mx.array):
        if prompt.ndim != 1 or not mx.issubdtype(prompt.dtype, mx.integer):
            raise UserError(
                f"the prompt is an array of shape {prompt.shape}, {prompt.dtype}: {EXPECTED}."
            )
        ids: Any = prompt
    else:
        ids = _token_ids(prompt)
    if len(ids) == 0:
        raise UserError("the prompt is empty: it needs at least one token.")
    if isinstance(ids, mx.array):
        low, high = int(ids.min().item()), int(ids.max().item())  # type: ignore[arg-type]
    else:
        low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        unknown = low if low < 0 else high
        raise UserError(
            f"the prompt holds token {shown(unknown)}; the model knows 0 to {vocab_size - 1}."
        )
    return ids if isinstance(ids, mx.array) else mx.array(ids, mx.int32)


def _token_ids(prompt: Any) -> list[int]:
    try:
        values = list(prompt)
    except TypeError as error:
        raise UserError(f"the prompt is {shown(prompt)}: {EXPECTED}.") from error
    for i, value in enumerate(values):
        if type(value) is not int:
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise UserError(f"the prompt's element {i} is {shown(value)}: {EXPECTED}.")
            values[i] = int(value)
    return values


def _messages_text(tokenizer: Any, prompt: Sequence[Any]) -> str:
    """Check chat messages and apply the chat template."""
    if not tokenizer.has_chat_template:
        raise UserError(
            "the prompt is a list of chat messages, but the model's tokenizer has no chat"
            " template: give a text."
        )
    for i, message in enumerate(prompt):
        if not isinstance(message, Mapping):
            raise UserError(f"message {i} is {shown(message)}, expected 'role' and 'content'.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = shown(message[key]) if key in message else "missing"
                raise UserError(f"message {i}: {key!r} is {found}, expected a text.")
    return chat_text(tokenizer, prompt)


def chat_text(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """Apply the chat template to messages, up to the start of the model's answer.

    Args:
        tokenizer: From `load`, with a chat template.
        messages: Mappings with "role" and "content". A last message of the assistant is continued.
        **options: More arguments for the template.

    Raises:
        UserError: If the template refuses the messages.
    """
    begun = messages[-1]["role"] == "assistant"
    defaults = {"add_generation_prompt": not begun, "continue_final_message": begun}
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], **{**defaults, **options, "tokenize": False}
        )
    except Exception as error:  # templates may raise any error
        raise UserError(
            f"the model's chat template refuses the prompt: {reason(error)}."
        ) from error
    return str(text)


def template_options(config: str | None) -> dict[str, Any]:
    """Parse `--chat-template-config`: arguments for the chat template.

    Raises:
        UserError: If it is not a JSON object.
    """
    try:
        options = {} if config is None else json.loads(config)
    except json.JSONDecodeError as error:
        raise UserError(f"--chat-template-config is not JSON: {error}.") from error
    except RecursionError as error:
        raise UserError("--chat-template-config is nested too deeply.") from error
    if not isinstance(options, dict):
        raise UserError("--chat-template-config must be a JSON object.")
    return options
