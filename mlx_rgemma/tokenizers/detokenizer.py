"""Streaming detokenization in bounded memory, and stop sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_rgemma.errors import UserError

TEXT_LIMIT = 4096
"""Characters of emitted text, and tokens, that a detokenizer keeps."""


class StreamingDetokenizer:
    """mlx-lm's streaming detokenizer, without the emitted text.

    Args:
        tokenizer: From `load`.
        after: The previous token, if the text continues a sentence: without it the space between
            two words is lost.
    """

    def __init__(self, tokenizer: Any, after: int | None = None) -> None:
        self.skip = 0
        if after is not None:
            before = StreamingDetokenizer(tokenizer)
            text = before.add(after) + before.finish()
            # An incomplete character is emitted when the next token completes it.
            self.skip = 0 if "\ufffd" in text else len(text)
        self.detokenizer = tokenizer.detokenizer
        if after is not None:
            self.detokenizer.add_token(after)

    def add(self, token: int) -> str:
        """Add a token and return the text that it completes, which may be empty.

        Raises:
            UserError: If the tokenizer does not have the token.
        """
        try:
            self.detokenizer.add_token(token)
        except IndexError as error:  # the vocabulary of the model is larger
            raise UserError(
                f"the model wrote token {token}, which its tokenizer does not have: is the"
                " tokenizer another model's?"
            ) from error
        return self._segment()

    def finish(self) -> str:
        """Return the text that was held back for the next token."""
        self.detokenizer.finalize()
        return self._segment()

    def _segment(self) -> str:
        d = self.detokenizer
        segment = d.last_segment
        if len(d.text) > TEXT_LIMIT:
            # `text` is a plain attribute of the fast detokenizers, `_text` of the general one.
            attribute = "_text" if hasattr(d, "_text") else "text"
            kept = getattr(d, attribute)
            dropped = max(0, min(len(kept), d.offset) - 64)
            setattr(d, attribute, kept[dropped:])
            d.offset -= dropped
        if len(d.tokens) > TEXT_LIMIT:
            d.tokens = []
        skipped = min(self.skip, len(segment))
        self.skip -= skipped
        return segment[skipped:]


class StopSequences:
    """Holds back text that may be the beginning of a stop sequence."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [s for s in stops if s]
        self.held = ""

    def feed(self, text: str, last: bool) -> tuple[str, bool]:
        """Return the text that can be emitted, and whether a stop sequence was found."""
        if not self.stops:
            return text, False
        text = self.held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            return text[: min(found)], True
        hold = 0 if last else max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold], False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
