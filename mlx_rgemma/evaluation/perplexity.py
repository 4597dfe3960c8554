"""Perplexity of a text, and the distance of a model's predictions from another model's."""

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
"""Tokens per call of the model, which bounds the logits in memory."""

BATCH_SIZE = 8
"""Sequences per batch."""


@dataclass(frozen=True)
class Quality:
    """Quality of a model's predictions on a text.

    Attributes:
        tokens: Number of predicted tokens.
        perplexity: exp of the mean negative log-likelihood per token.
        standard_error: Standard error of the perplexity.
        bits_per_byte: Negative log2-likelihood per byte of the UTF-8 text.
        mean_kl: Mean KL divergence from the reference model, in nats.
        top1_agreement: Fraction of positions where both models have the same top token.
    """

    tokens: int
    perplexity: float
    standard_error: float
    bits_per_byte: float
    mean_kl: float | None = None
    top1_agreement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TokenizedText:
    """A tokenized text.

    Attributes:
        sequences: Lists of tokens; all but the first token of each are predicted.
        nbytes: Bytes of the UTF-8 text.
        batch_size: Sequences per batch.
    """

    sequences: Sequence[Sequence[int]]
    nbytes: int
    batch_size: int = BATCH_SIZE

    @property
    def predicted(self) -> int:
        """Number of predicted tokens."""
        return sum(len(sequence) - 1 for sequence in self.sequences)


def tokenize_documents(
    tokenizer: Any,
    documents: Sequence[str],
    *,
    sequence_length: int | None = None,
    num_samples: int = -1,
    batch_size: int = BATCH_SIZE,
    seed: int = 123,
) -> TokenizedText:
    """Tokenize documents; each is between begin-of-text and end-of-text.

    Args:
        tokenizer: From `load`.
        documents: The texts.
        sequence_length: Concatenate all documents and split them into sequences of this length, as
            mlx-lm does; the remainder is dropped. Default: each document is a sequence.
        num_samples: Number of sequences, drawn at random; -1 for all.
        batch_size: Sequences per batch.
        seed: Seed of the draw.

    Raises:
        UserError: If there is no token to predict.
    """
    eos = tokenizer.eos_token_id
    tokens = [[*tokenizer.encode(text), *([] if eos is None else [eos])] for text in documents]
    sizes = [len(text.encode()) + 1 for text in documents]
    if sequence_length is not None:
        stream = [token for document in tokens for token in document]
        full = len(stream) // sequence_length
        tokens = [stream[i * sequence_length : (i + 1) * sequence_length] for i in range(full)]
        total = sum(sizes)
        sizes = [round(total * sequence_length / max(len(stream), 1))] * full
    if 0 <= num_samples < len(tokens):
        chosen = np.random.default_rng(seed).permutation(len(tokens))[:num_samples].tolist()
        tokens, sizes = [tokens[i] for i in chosen], [sizes[i] for i in chosen]
    kept = [(ids, size) for ids, size in zip(tokens, sizes, strict=True) if len(ids) > 1]
    if not kept:
        wanted = f" of {sequence_length} tokens" if sequence_length is not None else ""
        raise UserError(f"the text is too short: it holds no sequence{wanted} to predict.")
    kept.sort(key=lambda pair: len(pair[0]))  # similar lengths together: less padding
    return TokenizedText([ids for ids, _ in kept], sum(size for _, size in kept), batch_size)


class Reference:
    """Predictions of a reference model for a text.

    The final hidden state of each token is stored in a temporary file, and the embedding is kept;
    log-probabilities are recomputed from them, a few tokens at a time. So the model can be freed
    before another is loaded; stored logits would take a hundred times as much.

    Args:
        model: The reference model.
        text: The text.
        folder: Folder of the temporary file. Default: the system's.
    """

    def __init__(self, model: Model, text: TokenizedText, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._width = model.args.hidden_size
        self._dtype = mx.float32
        self.vocab_size = model.args.vocab_size
        for x, _ in _predictions(model, text):
            self._dtype = x.dtype
            self._file.write(np.array(x.astype(mx.float32)).tobytes())
        self._embedding, self._cap = model.model.embed_tokens, model.args.logits_soft_cap

    def log_probabilities(self, start: int, count: int) -> mx.array:
        """Return the log-probabilities of tokens `start` on, (count, vocab_size), fp32."""
        size = 4 * self._width
        self._file.seek(start * size)
        values = np.frombuffer(self._file.read(count * size), np.float32)
        x = mx.array(values.reshape(count, self._width)).astype(self._dtype)
        return log_softmax(tied_head(x, self._embedding, self._cap))

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()


def measure(model: Model, text: TokenizedText, reference: Reference | None = None) -> Quality:
    """Measure the quality of a model's predictions on a text.

    Args:
        model: The model.
        text: The text.
        reference: Predictions of another model for the same text.

    Raises:
        UserError: If the two models have different vocabularies.
    """
    if reference is not None and reference.vocab_size != model.args.vocab_size:
        raise UserError(
            f"the models have {model.args.vocab_size} and {reference.vocab_size} tokens; only"
            " models with the same tokenizer can be compared."
        )
    losses, kl, same, at = [], 0.0, 0, 0
    for x, targets in _predictions(model, text):
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
        bits_per_byte=float(nats.sum()) / math.log(2) / text.nbytes,
        mean_kl=None if reference is None else max(kl / nats.size, 0.0),
        top1_agreement=None if reference is None else same / nats.size,
    )


def _predictions(model: Model, text: TokenizedText) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield the final hidden states (n, D) and the targets (n,) of a few tokens at a time.

    The state is carried from chunk to chunk, so sequences may have any length.
    """
    for first in range(0, len(text.sequences), text.batch_size):
        batch = text.sequences[first : first + text.batch_size]
        lengths = np.array([len(sequence) - 1 for sequence in batch])
        padded = np.zeros((len(batch), lengths.max() + 1), np.int32)
        for i, sequence in enumerate(batch):
            padded[i, : len(sequence)] = sequence
        cache = model.make_cache(len(batch))
        step = max(TOKENS_AT_ONCE // len(batch), 1)
        for start in range(0, int(lengths.max()), step):
            stop = min(start + step, int(lengths.max()))
            with inference_mode():
                x = model.model(mx.array(padded[:, start:stop]), cache)
            # Drop the results of padding.
            counts = np.arange(start, stop)[None] < lengths[:, None]
            places = mx.array(np.flatnonzero(counts).astype(np.int32))
            x = x.reshape(-1, x.shape[-1])[places]
            mx.eval(x, [c.state for c in cache])
            yield x, mx.array(padded[:, start + 1 : stop + 1][counts])
            mx.clear_cache()
