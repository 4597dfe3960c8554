"""Tokenizing texts of any size in chunks, with the tokens of the whole text.

A chunk ends before a space or a newline that no token of the vocabulary joins to the character
before it. Byte-pair encoding then merges nothing across the boundary, so the concatenated tokens of
the chunks are those of the whole text. Some tokenizers insert a space at the beginning of a text
and after special tokens. So each chunk is encoded after the last character of the one before, whose
tokens are dropped; and no chunk ends after a special token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mlx_rgemma.errors import UserError

CHUNK_CHARS = 1 << 16
"""Characters read at a time."""

MAX_CHUNK_CHARS = 1 << 20
"""Maximum of characters per chunk: without a safe boundary, tokens may differ after it."""

SPACE = "▁"
CONTEXT_CHARS = ("\n", "a", ".", " ")
"""Contexts to encode a continuation after; the first that no token joins to it is used."""


class TextFile(Protocol):
    """An open text file, or an object with its `read`."""

    def read(self, size: int, /) -> str: ...


class ChunkedTokenizer:
    """A tokenizer of texts of any size, in bounded memory.

    Args:
        tokenizer: From `load`.
        chunk: Characters to read at a time.
        max_chunk: Maximum of characters per chunk.
    """

    def __init__(
        self, tokenizer: Any, chunk: int = CHUNK_CHARS, max_chunk: int = MAX_CHUNK_CHARS
    ) -> None:
        self.tokenizer = tokenizer
        self.chunk, self.max_chunk = chunk, max_chunk
        self.joined = _merge_pairs(tokenizer)
        self.special: dict[str, int] = tokenizer.get_added_vocab()

    def tokens(
        self, source: str | TextFile, *, begin: bool, last: int | None = None
    ) -> Iterator[list[int]]:
        """Yield the tokens of a text, in lists of bounded length.

        Args:
            source: A text, or an open text file.
            begin: Whether this is the beginning: the tokens then start with BOS. Otherwise a BOS
                in the text is removed.
            last: The previous token, if known.

        Raises:
            UserError: If the file does not hold UTF-8 text.
        """
        bos, first = self.tokenizer.bos_token, True
        # A tokenizer may insert a space after a special token, as at the beginning.
        before = next((text for text, token in self.special.items() if token == last), "")
        for text in self._chunks(source):
            if begin:
                special = bos is None or not text.startswith(bos)
                yield list(self.tokenizer.encode(text, add_special_tokens=special))
            else:
                yield self._encode_continuation(
                    before, text.removeprefix(bos or "") if first else text
                )
            begin = first = False
            before = text[-1]

    def _chunks(self, source: str | TextFile) -> Iterator[str]:
        """Yield the chunks of a text, none of them empty; a short text is one chunk."""
        held = ""
        for more in self._read(source):
            held += more
            if len(held) <= self.chunk:
                continue
            at = self._last_boundary(held)
            if at == 0 and len(held) >= self.max_chunk:
                at = len(held) - 1
            if at > 0:
                yield held[:at]
                held = held[at:]
        if held:
            yield held

    def _read(self, source: str | TextFile) -> Iterator[str]:
        if isinstance(source, str):
            if len(source) <= self.chunk:
                yield from [source] if source else []
                return
            for at in range(0, len(source), self.chunk):
                yield source[at : at + self.chunk]
            return
        name = getattr(source, "name", "the file")
        while True:
            try:
                text = source.read(self.chunk)
            except UnicodeDecodeError as error:
                raise UserError(f"{name}: not UTF-8 text ({error.reason}).") from error
            if not isinstance(text, str):
                raise UserError(f"{name}: opened in binary mode; open it as text.")
            if not text:
                return
            yield text

    def _last_boundary(self, text: str) -> int:
        """Return the last safe boundary of a text; 0 if there is none."""
        for at in range(len(text) - 1, 0, -1):
            if text[at] not in " \n" or not self._is_safe_boundary(text[at - 1], text[at]):
                continue
            if not text.endswith(tuple(self.special), 0, at):
                return at
        return 0

    def _is_safe_boundary(self, left: str, right: str) -> bool:
        """Return whether no token joins two characters."""
        return (left.replace(" ", SPACE), right.replace(" ", SPACE)) not in self.joined

    def _encode_continuation(self, before: str, text: str) -> list[int]:
        """Encode a continuation, without BOS and without an inserted space."""
        if not text:
            return []
        for anchor in (before, *CONTEXT_CHARS):
            if anchor and self._is_safe_boundary(anchor[-1], text[0]):
                head = list(self.tokenizer.encode(anchor, add_special_tokens=False))
                tokens = list(self.tokenizer.encode(anchor + text, add_special_tokens=False))
                if tokens[: len(head)] == head:
                    return tokens[len(head) :]
        return list(self.tokenizer.encode(text, add_special_tokens=False))


_PAIRS: WeakKeyDictionary[Any, frozenset[tuple[str, str]]] = WeakKeyDictionary()


def _merge_pairs(tokenizer: Any) -> frozenset[tuple[str, str]]:
    """Return the pairs of adjacent characters within tokens of the vocabulary.

    Only pairs that matter: before a possible boundary, or after a context.
    """
    pairs = _PAIRS.get(tokenizer)
    if pairs is None:
        found: set[tuple[str, str]] = set()
        anchors = {anchor.replace(" ", SPACE) for anchor in CONTEXT_CHARS}
        for entry in tokenizer.get_vocab():
            neighbours = pairwise(entry.replace(" ", SPACE))
            found.update((a, b) for a, b in neighbours if b in (SPACE, "\n") or a in anchors)
        pairs = _PAIRS[tokenizer] = frozenset(found)
    return pairs
