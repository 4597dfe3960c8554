"""A SentencePiece tokenizer of one's own, laid out as the embedded model's."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from mlx_rgemma.errors import UserError

PAD, EOS, BOS, UNK = 0, 1, 2, 3

DEFAULT_VOCAB_SIZE = 2048

MOST = re.compile(r"Vocabulary size too high .*<= (\d+)")
LEAST = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
"""Of SentencePiece's messages, with the size that is possible."""

MAX_SENTENCE_BYTES = 16_000
"""Longer lines are left out of the tokenizer's training, not of the model's."""


def train_tokenizer(documents: Sequence[str], vocab_size: int | None = None) -> bytes:
    """Train a byte-pair-encoding tokenizer; pad is 0, eos 1, bos 2, unknown 3.

    Newlines are tokens of their own, digits are split, and spaces are kept as they are.

    Args:
        documents: The text that it is trained on.
        vocab_size: How many tokens it gets; None for `DEFAULT_VOCAB_SIZE`, or as many as the text
            supports if those are fewer.

    Returns:
        The content of its `tokenizer.model`.

    Raises:
        UserError: If the text does not support so many tokens, or needs more.
    """
    try:
        return _train(documents, vocab_size or DEFAULT_VOCAB_SIZE)
    except (RuntimeError, OSError) as error:
        most, least = _number(MOST, error), _number(LEAST, error)
        if most is not None and vocab_size is None:
            return _train(documents, most)
        if most is not None:
            reason = f"the text supports no more than {most} tokens; give that, or more text"
        elif least is not None:
            reason = f"each character of the text is a token; give at least {least}"
        else:
            reason = "the text does not support a tokenizer; give more text, in shorter lines"
        raise UserError(f"--vocab-size {vocab_size or DEFAULT_VOCAB_SIZE}: {reason}.") from error


def _train(documents: Sequence[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            line for document in documents for line in document.split("\n") if line.strip()
        ),
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
    return model.getvalue()


def _number(pattern: re.Pattern[str], error: Exception) -> int | None:
    """Return the number in SentencePiece's message, if it is that message."""
    found = pattern.search(str(error))
    return None if found is None else int(found[1])
