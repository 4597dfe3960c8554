"""Keep the states of conversations for later turns, separately per client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache


class Prompt(list[int]):
    """Tokens of a request, tagged with its client, also after slicing."""

    def __init__(self, tokens: Iterable[int], client: int | None) -> None:
        super().__init__(tokens)
        self.client = client

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Prompt(found, self.client) if isinstance(index, slice) else found


class PromptCacheStore(LRUPromptCache):
    """LRU cache of the states of conversations.

    A state is available only to the client of its prompt: `cached_tokens` and response times would
    otherwise leak prompts between clients. States of tokens without a client are not kept.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return the client's state of the longest known prefix, and the remaining tokens.

        There is at least one, whose logits start the answer.
        """
        client = getattr(tokens, "client", None)
        if client is None or len(tokens) < 2:
            return None, tokens
        cache, rest = super().fetch_nearest_cache((model, client), tokens[:-1])
        return cache, [*rest, tokens[-1]]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
    ) -> None:
        """Keep a state, evaluated so that it does not hold the arrays of its batch."""
        client = getattr(tokens, "client", None)
        if client is None:
            return
        mx.eval([layer.state for layer in prompt_cache])
        super().insert_cache((model, client), tokens, prompt_cache, **kwargs)
