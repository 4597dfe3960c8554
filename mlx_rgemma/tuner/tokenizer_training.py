"""A SentencePiece tokenizer of one's own, laid out as the embedded model's."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from mlx_rgemma.errors import UserError

PAD, EOS, BOS, UNK = 0, 1, 2, 3

MAX_SENTENCE_BYTES = 16_000
"""Longer lines are left out of the tokenizer's training, not of the model's."""


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-pair-encoding tokenizer; pad is 0, eos 1, bos 2, unknown 3.

    Newlines are tokens of their own, digits are split, and spaces are kept as they are.

    Args:
        documents: The text that it is trained on.
        vocab_size: How many tokens it gets.
        path: The `tokenizer.model` to be written.

    Raises:
        UserError: If the text does not support so many tokens, or needs more.
    """
    import sentencepiece

    lines = (line for document in documents for line in document.split("\n") if line.strip())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            pad_id=PAD,
            eos_id=EOS,
            bos_id=BOS,
            unk_id=UNK,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=1,  # the same tokenizer everywhere
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--vocab-size {vocab_size}: the text does not support such a tokenizer:"
            f" {_reason(str(error))}."
        ) from error
    path.write_bytes(model.getvalue())


def _reason(message: str) -> str:
    """The last sentence of what SentencePiece says, without the place in its sources."""
    return message.rpartition("] ")[2].strip().rstrip(".") or message.strip()
