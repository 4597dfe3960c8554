"""Training of a SentencePiece tokenizer, with the special tokens of the embedded model's."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from mlx_rgemma.errors import UserError

PAD, EOS, BOS, UNK = 0, 1, 2, 3

DEFAULT_VOCAB_SIZE = 2048

MAX_SIZE = re.compile(r"Vocabulary size too high .*<= (\d+)")
MIN_SIZE = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
"""SentencePiece's messages, with the possible size."""

MAX_SENTENCE_BYTES = 16_000
"""Longer lines are skipped in the tokenizer's training, not in the model's."""


def train_tokenizer(documents: Sequence[str], vocab_size: int | None = None) -> bytes:
    """Train a byte-pair-encoding tokenizer; pad is 0, eos 1, bos 2, unknown 3.

    Newlines and digits are separate tokens; spaces are kept.

    Args:
        documents: The training text.
        vocab_size: Size of the vocabulary; None for `DEFAULT_VOCAB_SIZE`, or the maximum that the
            text supports if that is smaller.

    Returns:
        The content of its `tokenizer.model`.

    Raises:
        UserError: If the text supports only a smaller vocabulary, or needs a larger one.
    """
    try:
        return _train(documents, vocab_size or DEFAULT_VOCAB_SIZE)
    except (RuntimeError, OSError) as error:
        maximum, minimum = _number(MAX_SIZE, error), _number(MIN_SIZE, error)
        if maximum is not None and vocab_size is None:
            return _train(documents, maximum)
        if maximum is not None:
            why = f"the text supports at most {maximum} tokens; give that, or more text"
        elif minimum is not None:
            why = f"each character of the text is a token; give at least {minimum}"
        else:
            why = "the text does not support a tokenizer; give more text, in shorter lines"
        raise UserError(f"--vocab-size {vocab_size or DEFAULT_VOCAB_SIZE}: {why}.") from error


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
    """Return the number in SentencePiece's message, if the message matches."""
    found = pattern.search(str(error))
    return None if found is None else int(found[1])
