"""Truncated backpropagation through time: documents of any length, read in chunks.

The state is carried from each chunk to the next; gradients stop at the beginning of a chunk. Each
sequence of a batch is a stream: the chunks of its documents, one after the other. The losses of all
chunks add up to that of the whole documents.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.tuner.data.packing import (
    Batch,
    Documents,
    Span,
    build_sequence,
    slice_spans,
    stack_sequences,
)
from mlx_rgemma.tuner.grad_checkpoint import cache_arrays, set_cache_arrays
from mlx_rgemma.tuner.loss import batch_loss


class StatefulBatches:
    """Batches whose sequences continue those of the batch before.

    Each document belongs to one stream, so that all streams are about equally long. Each epoch of a
    stream shuffles its documents. `segment_pos` counts from the beginning of a document, also after
    a split.

    Args:
        documents: The documents.
        batch_size: Number of streams.
        sequence_length: Tokens per chunk.
        seed: Seed of the order; None to read the documents once, in their order, with padding at
            the end.

    Raises:
        UserError: If there are fewer documents than streams.
    """

    def __init__(
        self, documents: Documents, batch_size: int, sequence_length: int, seed: int | None
    ) -> None:
        found = int((documents.steps > 0).sum())
        if found < batch_size:
            raise UserError(
                f"the data set has {found} documents, and --carry-state needs one per sequence of"
                f" a batch; give a --batch-size of at most {found}."
            )
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        self.streams: list[list[int]] = [[] for _ in range(batch_size)]
        totals = [0] * batch_size
        for document in np.argsort(-documents.steps, kind="stable"):
            shortest = int(np.argmin(totals))
            self.streams[shortest].append(int(document))
            totals[shortest] += int(documents.steps[document])
        for stream in self.streams:
            stream.sort()
        self.totals = totals

    def __len__(self) -> int:
        """Return the number of batches until all streams have read all documents once."""
        return -(-max(self.totals) // self.sequence_length)

    def __getitem__(self, step: int) -> Batch:
        return stack_sequences([self._chunk(stream, step) for stream in range(len(self.streams))])

    def _chunk(self, stream: int, step: int) -> np.ndarray:
        start, stop = step * self.sequence_length, (step + 1) * self.sequence_length
        total = self.totals[stream]
        spans: list[Span] = []
        while start < stop and (self.seed is not None or start < total):
            epoch, begin = divmod(start, total)
            length = min(stop - start, total - begin)
            spans += self._spans(stream, epoch, begin, length)
            start += length
        chunk = build_sequence(self.documents, spans, self.sequence_length)
        at = 0
        for span in spans:
            chunk[3, at : at + len(span)] += span.start
            at += len(span)
        return chunk

    def _spans(self, stream: int, epoch: int, begin: int, length: int) -> list[Span]:
        """Return the spans of a stream from step `begin` of one of its epochs."""
        order = np.array(self.streams[stream])
        if self.seed is not None:
            order = np.random.default_rng([self.seed, stream, epoch]).permutation(order)
        ends = np.cumsum(self.documents.steps[order])
        return slice_spans(order, ends, begin, begin + length)


class StatefulLoss:
    """A loss that carries the model's state from each batch to the next; part of checkpoints.

    Args:
        model: The model.
        batch_size: Sequences per batch.
    """

    def __init__(self, model: Model, batch_size: int) -> None:
        self.cache: list[GriffinCache] = model.make_cache(batch_size)

    def __call__(self, model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
        """Compute `batch_loss`; gradients stop at the beginning of the batch."""
        loss, count = batch_loss(model, batch, self.cache)
        arrays = [mx.stop_gradient(a) for layer in self.cache for a in cache_arrays(layer)]
        # Evaluate the state with the loss: otherwise it keeps the graph of this batch alive.
        (loss,) = mx.depends([loss], arrays)
        rest = iter(arrays)
        for layer in self.cache:
            set_cache_arrays(layer, [next(rest) for _ in cache_arrays(layer)])
        return loss, count

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays of the state by name."""
        return {
            f"{i}.{j}": array
            for i, layer in enumerate(self.cache)
            for j, array in enumerate(layer.state)
        }

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """Restore the state from `arrays`."""
        for i, layer in enumerate(self.cache):
            layer.state = tuple(arrays[f"{i}.{j}"] for j in range(len(layer.state)))
