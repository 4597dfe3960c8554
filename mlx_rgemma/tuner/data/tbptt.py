"""Training on documents of any length: read in chunks, the state handed from each to the next.

Truncated backpropagation through time: gradients reach back to the beginning of a chunk, the state
that it starts from is given. Every row of a batch is a stream of its own: chunk after chunk of its
documents, one behind the other. The losses of all chunks add up to that of the whole documents.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.tuner.data.batch import Batch
from mlx_rgemma.tuner.data.packing import Documents, Span, build_row, slice_spans, stack_rows
from mlx_rgemma.tuner.loss import batch_loss


class StatefulBatches:
    """Batches whose rows go on where those of the batch before ended.

    Each document belongs to one row, such that the rows have about as much to read. In each epoch
    of a row its documents are shuffled. `segment_pos` counts from the beginning of a document,
    wherever it is cut.

    Args:
        documents: What is read.
        batch_size: Rows.
        row_length: Tokens of a chunk.
        seed: Of the order; None for that of the documents, read once, with padding at the end.

    Raises:
        UserError: If there are fewer documents than rows.
    """

    def __init__(
        self, documents: Documents, batch_size: int, row_length: int, seed: int | None
    ) -> None:
        found = int((documents.steps > 0).sum())
        if found < batch_size:
            raise UserError(
                f"the data set has {found} documents, and with carried state every row reads"
                f" documents of its own; give a --batch-size of at most {found}."
            )
        self.documents, self.row_length, self.seed = documents, row_length, seed
        self.streams: list[list[int]] = [[] for _ in range(batch_size)]
        totals = [0] * batch_size
        for document in np.argsort(-documents.steps, kind="stable"):
            row = int(np.argmin(totals))
            self.streams[row].append(int(document))
            totals[row] += int(documents.steps[document])
        for stream in self.streams:
            stream.sort()
        self.totals = totals

    def __len__(self) -> int:
        """Batches until all rows have read all their documents once."""
        return -(-max(self.totals) // self.row_length)

    def __getitem__(self, step: int) -> Batch:
        return stack_rows([self._row(row, step) for row in range(len(self.streams))])

    def _row(self, row: int, step: int) -> np.ndarray:
        at, stop, total = step * self.row_length, (step + 1) * self.row_length, self.totals[row]
        pieces: list[Span] = []
        while at < stop and (self.seed is not None or at < total):
            epoch, begin = divmod(at, total)
            length = min(stop - at, total - begin)
            pieces += self._pieces(row, epoch, begin, length)
            at += length
        laid = build_row(self.documents, pieces, self.row_length)
        at = 0
        for piece in pieces:
            laid[3, at : at + len(piece)] += piece.start
            at += len(piece)
        return laid

    def _pieces(self, row: int, epoch: int, begin: int, length: int) -> list[Span]:
        """What a row reads from `begin` on in one of its epochs."""
        order = np.array(self.streams[row])
        if self.seed is not None:
            order = np.random.default_rng([self.seed, row, epoch]).permutation(order)
        ends = np.cumsum(self.documents.steps[order])
        return slice_spans(order, ends, begin, begin + length)


class StatefulLoss:
    """A loss of batches that remembers where the last one ended; part of a run's checkpoints.

    Args:
        model: The model.
        batch_size: Rows of every batch.
    """

    def __init__(self, model: Model, batch_size: int) -> None:
        self.cache: list[GriffinCache] = model.make_cache(batch_size)

    def __call__(self, model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
        """See `batch_loss`; gradients do not reach into batches before this one."""
        loss, count = batch_loss(model, batch, self.cache)
        state = [mx.stop_gradient(array) for array in _arrays(self.cache)]
        # Whoever evaluates the loss evaluates the state, which then holds on to nothing else.
        (loss,) = mx.depends([loss], state)
        _set_arrays(self.cache, state)
        return loss, count

    def arrays(self) -> dict[str, mx.array]:
        """All of the state, by name."""
        return {
            f"{i}.{j}": array
            for i, layer in enumerate(self.cache)
            for j, array in enumerate(layer.state)
        }

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """Go on from what `arrays` gave."""
        for i, layer in enumerate(self.cache):
            layer.state = tuple(arrays[f"{i}.{j}"] for j in range(len(layer.state)))


FIELDS = ("h", "conv", "kv")


def _arrays(cache: list[GriffinCache]) -> list[mx.array]:
    return [getattr(layer, name) for layer in cache for name in FIELDS if hasattr(layer, name)]


def _set_arrays(cache: list[GriffinCache], arrays: list[Any]) -> None:
    values = iter(arrays)
    for layer in cache:
        for name in FIELDS:
            if hasattr(layer, name):
                setattr(layer, name, next(values))
