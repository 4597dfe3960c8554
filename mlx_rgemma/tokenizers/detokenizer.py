"""From tokens to text, piece by piece, without keeping what has been handed out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_rgemma.errors import UserError

TEXT_LIMIT = 4096
"""Characters of finished text, and tokens, that a detokenizer keeps."""


class StreamingDetokenizer:
    """mlx-lm's streaming detokenizer, forgetting what has been handed out.

    Args:
        tokenizer: From `load`.
        after: The token that the text continues, if it is in the middle of a sentence: the
            space between words would be lost otherwise.
    """

    def __init__(self, tokenizer: Any, after: int | None = None) -> None:
        self.skip = 0
        if after is not None:
            before = StreamingDetokenizer(tokenizer)
            text = before.add(after) + before.finish()
            # Half a character is completed by what follows, and shown then.
            self.skip = 0 if "\ufffd" in text else len(text)
        self.detokenizer = tokenizer.detokenizer
        if after is not None:
            self.detokenizer.add_token(after)

    def add(self, token: int) -> str:
        """Return the text that a token completes (may be empty).

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
        """The text that was held back for tokens to come."""
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
    """Holds back text that may turn out to be a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [s for s in stops if s]
        self.held = ""

    def feed(self, text: str, last: bool) -> tuple[str, bool]:
        """-> the text that may be shown, and whether a stop text has appeared."""
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
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
