"""Spelling a text in other tokens now and then, so that a small text is not learned by heart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_rgemma.tuner.packing import Documents

ROUNDS = 3


class TokenSplitting:
    """Undoes merges by chance, a relative of BPE-dropout (Provilkov et al., arXiv:1910.13267).

    Each token that was merged from two others is replaced by the two with probability `rate`;
    their parts may be split again, `ROUNDS` times at most.

    Args:
        splits: (vocabulary, 2), int32. The two parts of each token; -1 where it has none.
        rate: The probability.
    """

    def __init__(self, splits: np.ndarray, rate: float) -> None:
        self.splits, self.rate = splits, rate

    def __call__(self, documents: Documents, rng: np.random.Generator) -> Documents:
        ids, counts = documents.ids, np.diff(documents.offsets)
        owner = np.repeat(np.arange(len(counts)), counts)
        for _ in range(ROUNDS):
            split = (self.splits[ids, 0] >= 0) & (rng.random(len(ids)) < self.rate)
            size = 1 + split
            first = np.cumsum(size) - size
            longer = np.repeat(ids, size)
            longer[first[split]] = self.splits[ids[split], 0]
            longer[first[split] + 1] = self.splits[ids[split], 1]
            ids, owner = longer, np.repeat(owner, size)
        offsets = np.searchsorted(owner, np.arange(len(counts) + 1))
        return Documents(ids, offsets.astype(np.int64), documents.first_targets)


def merges(pieces: Sequence[str]) -> np.ndarray:
    """How each token was merged, from the pieces of a SentencePiece BPE vocabulary.

    Merged pieces are numbered in the order in which they were made, so the parts of a piece are
    smaller (or single characters), and of several pairs the one that was complete first was merged.

    Returns:
        (vocabulary, 2), int32; -1 for tokens that were not merged.
    """
    # Single characters were there from the start; control tokens and bytes are never a part.
    made = {
        piece: -1 if len(piece) == 1 else i
        for i, piece in enumerate(pieces)
        if not (piece.startswith("<") and piece.endswith(">"))
    }
    index = {piece: i for i, piece in enumerate(pieces)}
    found = np.full((len(pieces), 2), -1, np.int32)
    for i, piece in enumerate(pieces):
        if piece not in made:
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(a, b) for a, b in pairs if made.get(a, i) < i and made.get(b, i) < i]
        if pairs:
            first, second = min(pairs, key=lambda pair: max(made[pair[0]], made[pair[1]]))
            found[i] = index[first], index[second]
    return found


def token_splitting(tokenizer_model: Path, rate: float) -> TokenSplitting:
    """From a SentencePiece BPE model."""
    import sentencepiece  # type: ignore[import-untyped]

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return TokenSplitting(merges(pieces), rate)
