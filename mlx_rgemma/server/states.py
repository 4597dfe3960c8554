"""Keep the states of conversations for later turns, apart for each client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache


class Prompt(list[int]):
    """Tokens of a request, which stay tagged with its client through slices and growth."""

    def __init__(self, tokens: Iterable[int], client: int | None) -> None:
        super().__init__(tokens)
        self.client = client

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Prompt(found, self.client) if isinstance(index, slice) else found


class PromptCacheStore(LRUPromptCache):
    """States of conversations, the least recently used ones dropped first.

    A state is found only by the client whose prompt it was made from: `cached_tokens` and the time
    of an answer would otherwise tell one client what another asked. Tokens without a client are
    neither kept nor found.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return the client's state of the longest known prefix, and the tokens left to read.

        There is at least one: the model needs it to go on from.
        """
        client = getattr(tokens, "client", None)
        if client is None or len(tokens) < 2:
            return None, tokens
        cache, rest = super().fetch_nearest_cache((model, client), tokens[:-1])
        return cache, [*rest, tokens[-1]]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
    ) -> None:
        """Keep a state, as arrays of its own and not as a part of a batch's."""
        client = getattr(tokens, "client", None)
        if client is None:
            return
        mx.eval([layer.state for layer in prompt_cache])
        super().insert_cache((model, client), tokens, prompt_cache, **kwargs)
