"""Tokens of texts of any size, piece by piece: the tokens that the whole text has.

A piece ends before a space or a newline that no entry of the vocabulary joins to the character
before it. A tokenizer that merges pairs (byte-pair encoding) can then merge nothing across the
cut, so that the pieces' tokens, end to end, are those of the whole text. What a tokenizer puts in
front of any text (a space, for some; behind a special token, too, where nothing is cut for that
reason) is taken off again: each piece is read behind the last character of the one before, and
that character's tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mlx_rgemma.errors import UserError

PIECE = 1 << 16
"""Characters read at a time."""

LONGEST = 1 << 20
"""Characters after which a text is cut even where its tokens may then differ."""

SPACE = "▁"
CONTEXT_CHARS = ("\n", "a", ".", " ")
"""Texts that a continuation may be tokenized after; the first that no token joins to it."""


class TextFile(Protocol):
    """An open file of text, or anything that can be read like one."""

    def read(self, size: int, /) -> str: ...


class ChunkedTokenizer:
    """A tokenizer that reads texts of any size in bounded memory.

    Args:
        tokenizer: From `load`.
        piece: Characters to read at a time.
        longest: Characters without a place to cut after which it is cut all the same.
    """

    def __init__(self, tokenizer: Any, piece: int = PIECE, longest: int = LONGEST) -> None:
        self.tokenizer = tokenizer
        self.piece, self.longest = piece, longest
        self.joined = _merge_pairs(tokenizer)
        self.special: dict[str, int] = tokenizer.get_added_vocab()

    def tokens(
        self, source: str | TextFile, *, begin: bool, last: int | None = None
    ) -> Iterator[list[int]]:
        """The tokens of a text, in lists of bounded length.

        Args:
            source: A text, or an open text file.
            begin: Whether nothing came before: the tokens then begin with BOS. Otherwise they have
                none, also where the text itself begins with it.
            last: The token that came before, if it is known.

        Raises:
            UserError: If the file holds no UTF-8 text.
        """
        bos, first = self.tokenizer.bos_token, True
        # Text behind a special token may get a space in front of it, as at the beginning.
        before = next((text for text, token in self.special.items() if token == last), "")
        for text in self._cut(source):
            if begin:
                special = bos is None or not text.startswith(bos)
                yield list(self.tokenizer.encode(text, add_special_tokens=special))
            else:
                yield self._encode_continuation(
                    before, text.removeprefix(bos or "") if first else text
                )
            begin = first = False
            before = text[-1]

    def _cut(self, source: str | TextFile) -> Iterator[str]:
        """The text in pieces, none of them empty; one that is short enough stays whole."""
        held = ""
        for more in self._read(source):
            held += more
            if len(held) <= self.piece:
                continue
            at = self._last_cut(held)
            if at == 0 and len(held) >= self.longest:
                at = len(held) - 1
            if at > 0:
                yield held[:at]
                held = held[at:]
        if held:
            yield held

    def _read(self, source: str | TextFile) -> Iterator[str]:
        if isinstance(source, str):
            if len(source) <= self.piece:
                yield from [source] if source else []
                return
            for at in range(0, len(source), self.piece):
                yield source[at : at + self.piece]
            return
        name = getattr(source, "name", "the file")
        while True:
            try:
                text = source.read(self.piece)
            except UnicodeDecodeError as error:
                raise UserError(f"{name}: not UTF-8 text ({error.reason}).") from error
            if not isinstance(text, str):
                raise UserError(f"{name}: opened for bytes; open it as text.")
            if not text:
                return
            yield text

    def _last_cut(self, text: str) -> int:
        """The last place where a text can be cut; 0 where there is none."""
        for at in range(len(text) - 1, 0, -1):
            if text[at] not in " \n" or not self._is_safe_boundary(text[at - 1], text[at]):
                continue
            if not text.endswith(tuple(self.special), 0, at):
                return at
        return 0

    def _is_safe_boundary(self, left: str, right: str) -> bool:
        """Whether no token joins two characters."""
        return (left.replace(" ", SPACE), right.replace(" ", SPACE)) not in self.joined

    def _encode_continuation(self, before: str, text: str) -> list[int]:
        """Return the tokens of a continuation, without BOS and without a space in front."""
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
    """The pairs of neighbouring characters that some entry of the vocabulary holds.

    Only those where a text may be cut, or be read behind an anchor: others are not asked for.
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
