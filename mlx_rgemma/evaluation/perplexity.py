"""How well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.model import Model, tied_head
from mlx_rgemma.ops import inference_mode
from mlx_rgemma.ops.sums import log_softmax, long_sum

TOKENS_AT_ONCE = 256
"""Tokens that go through a model together: the logits of no more are ever held."""

BATCH_SIZE = 8
"""Documents that are read together."""


@dataclass(frozen=True)
class Quality:
    """What a model makes of a text.

    Attributes:
        tokens: How many tokens were predicted.
        perplexity: exp of the mean negative log-likelihood of a token.
        standard_error: Of the perplexity, by the spread of the tokens.
        bits_per_byte: Bits that the text takes, by the model's predictions, per byte of UTF-8.
        mean_kl: Mean KL divergence, in nats, from the reference's predictions.
        top1_agreement: Share of the places where both put the same token first.
    """

    tokens: int
    perplexity: float
    standard_error: float
    bits_per_byte: float
    mean_kl: float | None = None
    top1_agreement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """A text in tokens.

    Attributes:
        tokens: One list a document; all but the first of each are predicted.
        nbytes: Bytes of UTF-8 that they stand for.
        batch_size: Rows that are read together.
    """

    tokens: Sequence[Sequence[int]]
    nbytes: int
    batch_size: int = BATCH_SIZE

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return sum(len(row) - 1 for row in self.tokens)


def encode_rows(
    tokenizer: Any,
    documents: Sequence[str],
    *,
    sequence_length: int | None = None,
    num_samples: int = -1,
    batch_size: int = BATCH_SIZE,
    seed: int = 123,
) -> Rows:
    """Tokens of documents, each between begin-of-text and end-of-text.

    Args:
        tokenizer: From `load`.
        documents: The texts.
        sequence_length: Cut the tokens of all documents, laid end to end, into rows of this
            length, as mlx-lm does; a last row that is not full is left out. By default each
            document is a row.
        num_samples: Take so many rows, chosen by chance; -1 takes all.
        batch_size: Rows that are read together.
        seed: Of the choice.

    Raises:
        UserError: If there is nothing to predict.
    """
    eos = tokenizer.eos_token_id
    rows = [[*tokenizer.encode(text), *([] if eos is None else [eos])] for text in documents]
    sizes = [len(text.encode()) + 1 for text in documents]
    if sequence_length is not None:
        stream = [token for row in rows for token in row]
        full = len(stream) // sequence_length
        rows = [stream[i * sequence_length : (i + 1) * sequence_length] for i in range(full)]
        total = sum(sizes)
        sizes = [round(total * sequence_length / max(len(stream), 1))] * full
    if 0 <= num_samples < len(rows):
        chosen = np.random.default_rng(seed).permutation(len(rows))[:num_samples].tolist()
        rows, sizes = [rows[i] for i in chosen], [sizes[i] for i in chosen]
    kept = [(row, size) for row, size in zip(rows, sizes, strict=True) if len(row) > 1]
    if not kept:
        wanted = f" of {sequence_length} tokens" if sequence_length is not None else ""
        raise UserError(f"the text is too short: it holds no row{wanted} to predict.")
    # Rows of like length together: little of a batch is padding then.
    kept.sort(key=lambda pair: len(pair[0]))
    return Rows([row for row, _ in kept], sum(size for _, size in kept), batch_size)


class Reference:
    """The predictions of one model for a text, to compare others with.

    What is kept is the model's final hidden state of each token, in a temporary file, and its
    embedding; log-probabilities are made from them again, a few tokens at a time. So the model
    itself can be let go of before another is loaded, and no logits are stored: they would take
    a hundred times as much.

    Args:
        model: The reference.
        rows: The text.
        folder: Where to keep the temporary file; by default the system's place.
    """

    def __init__(self, model: Model, rows: Rows, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._width = model.args.hidden_size
        self._dtype = mx.float32
        self.vocab_size = model.args.vocab_size
        for x, _ in _predictions(model, rows):
            self._dtype = x.dtype
            self._file.write(np.array(x.astype(mx.float32)).tobytes())
        self._embedding, self._cap = model.model.embed_tokens, model.args.logits_soft_cap

    def log_probabilities(self, start: int, count: int) -> mx.array:
        """Of the tokens that come `start`-th and after, (count, vocab_size), fp32."""
        size = 4 * self._width
        self._file.seek(start * size)
        values = np.frombuffer(self._file.read(count * size), np.float32)
        x = mx.array(values.reshape(count, self._width)).astype(self._dtype)
        return log_softmax(tied_head(x, self._embedding, self._cap))

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()


def measure(model: Model, rows: Rows, reference: Reference | None = None) -> Quality:
    """Read a text with a model.

    Args:
        model: The model.
        rows: The text.
        reference: What another model predicted for the same rows.

    Raises:
        UserError: If the two models have different vocabularies.
    """
    if reference is not None and reference.vocab_size != model.args.vocab_size:
        raise UserError(
            f"the models have {model.args.vocab_size} and {reference.vocab_size} tokens; only"
            " models with the same tokenizer can be compared."
        )
    losses, kl, same, at = [], 0.0, 0, 0
    for x, targets in _predictions(model, rows):
        logp = log_softmax(model.head(x))
        loss = -mx.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
        if reference is not None:
            expected = reference.log_probabilities(at, targets.size)
            divergence = long_sum(mx.exp(expected) * (expected - logp))
            agree = expected.argmax(axis=-1) == logp.argmax(axis=-1)
            kl += float(np.array(divergence, dtype=np.float64).sum())
            same += int(np.array(agree).sum())
        losses.append(np.array(loss, dtype=np.float64))
        at += targets.size
    nats = np.concatenate(losses)
    mean = float(nats.mean())
    perplexity = math.exp(mean) if mean < 700 else math.inf
    spread = float(nats.std(ddof=1)) / math.sqrt(nats.size) if nats.size > 1 else 0.0
    return Quality(
        tokens=nats.size,
        perplexity=perplexity,
        standard_error=perplexity * spread,
        bits_per_byte=float(nats.sum()) / math.log(2) / rows.nbytes,
        mean_kl=None if reference is None else max(kl / nats.size, 0.0),
        top1_agreement=None if reference is None else same / nats.size,
    )


def _predictions(model: Model, rows: Rows) -> Iterator[tuple[mx.array, mx.array]]:
    """Of a few tokens at a time: the final hidden state (n, D), and the tokens that came (n,).

    Rows are read from left to right, their state carried on, so a row may have any length.
    """
    for first in range(0, len(rows.tokens), rows.batch_size):
        batch = rows.tokens[first : first + rows.batch_size]
        lengths = np.array([len(row) - 1 for row in batch])
        padded = np.zeros((len(batch), lengths.max() + 1), np.int32)
        for i, row in enumerate(batch):
            padded[i, : len(row)] = row
        cache = model.make_cache(len(batch))
        step = max(TOKENS_AT_ONCE // len(batch), 1)
        for start in range(0, int(lengths.max()), step):
            stop = min(start + step, int(lengths.max()))
            with inference_mode():
                x = model.model(mx.array(padded[:, start:stop]), cache)
            # What is behind the end of a row was computed for nothing, and is dropped.
            counts = np.arange(start, stop)[None] < lengths[:, None]
            places = mx.array(np.flatnonzero(counts).astype(np.int32))
            x = x.reshape(-1, x.shape[-1])[places]
            mx.eval(x, [c.state for c in cache])
            yield x, mx.array(padded[:, start + 1 : stop + 1][counts])
            mx.clear_cache()
