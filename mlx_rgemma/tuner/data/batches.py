"""Data sets and batches in an order that is a pure function of the seed and the step.

So a resumed run needs its step and nothing else, however many ranks split the batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.data.packing import (
    Batch,
    Documents,
    Span,
    best_fit_pack,
    build_sequence,
    slice_spans,
    stack_documents,
    stack_sequences,
)


class Batches(Protocol):
    """Endless batches: `batches[step]`."""

    def __getitem__(self, step: int) -> Batch: ...


class Dataset(Protocol):
    """Endless sequences: `dataset[number]` is (4, sequence_length), see `build_sequence`."""

    def __getitem__(self, number: int) -> np.ndarray: ...


class ConcatDataset:
    """Full sequences: in each epoch the documents are shuffled, concatenated and split.

    Args:
        documents: The documents.
        sequence_length: Steps per sequence.
        seed: Seed of the order.

    Raises:
        UserError: If the documents do not fill a sequence.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int) -> None:
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        total = int(documents.steps.sum())
        self.sequences_per_epoch = total // sequence_length
        if not self.sequences_per_epoch:
            raise UserError(
                f"the training text has {total} tokens, fewer than one sequence of"
                f" {sequence_length}; give more text or a smaller --context-length."
            )
        self._epoch = -1

    def __getitem__(self, number: int) -> np.ndarray:
        epoch, index = divmod(number, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._begin(epoch)
        start = index * self.sequence_length
        spans = slice_spans(self._order, self._ends, start, start + self.sequence_length)
        return build_sequence(self.documents, spans, self.sequence_length)

    def _begin(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        self._order = rng.permutation(len(self.documents))
        self._ends = np.cumsum(self.documents.steps[self._order])
        self._epoch = epoch


class PackedDataset:
    """Packed sequences, with whole documents where they fit; shuffled in each epoch."""

    def __init__(self, documents: Documents, sequence_length: int, seed: int) -> None:
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        self.spans: list[list[Span]] = best_fit_pack(documents.steps, sequence_length)
        if not self.spans:
            raise UserError("the training text has no token to predict.")
        self._epoch = -1

    @property
    def sequences_per_epoch(self) -> int:
        """Number of sequences that hold all documents once."""
        return len(self.spans)

    def __getitem__(self, number: int) -> np.ndarray:
        epoch, index = divmod(number, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.spans))
            self._epoch = epoch
        spans = self.spans[int(self._order[index])]
        return build_sequence(self.documents, spans, self.sequence_length)


class MixtureDataset:
    """Mixture of several data sets, in given proportions.

    Args:
        datasets: The data sets.
        weights: Weight of each; they are divided by their sum.
        seed: Seed of the order.
    """

    PERIOD = 1000
    """Sequences in which each data set has its share exactly, to a thousandth."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], seed: int) -> None:
        self.datasets = list(datasets)
        shares = np.cumsum(weights) / np.sum(weights)
        borders = np.round(np.concatenate([[0.0], shares]) * self.PERIOD).astype(int)
        turns = np.repeat(np.arange(len(self.datasets)), np.diff(borders))
        self._turns = np.random.default_rng([seed, len(turns)]).permutation(turns)
        self._counts = np.diff(borders)
        self._before = np.zeros(self.PERIOD, int)
        for dataset in range(len(self.datasets)):
            chosen = self._turns == dataset
            self._before[chosen] = np.arange(chosen.sum())

    def __getitem__(self, number: int) -> np.ndarray:
        period, index = divmod(number, self.PERIOD)
        chosen = int(self._turns[index])
        return self.datasets[chosen][period * int(self._counts[chosen]) + int(self._before[index])]


class DataLoader:
    """Batches of `batch_size` sequences of a data set, in its order."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_size
        return stack_sequences([self.dataset[first + i] for i in range(self.batch_size)])


class PaddedBatches:
    """Batches of one document per sequence, documents of similar length together, as in mlx-lm.

    Documents are sorted by length and divided into batches once; each epoch shuffles the batches.
    Sequences are padded on the right to one more than a multiple of 32 tokens; documents longer
    than `max_length` are truncated. The last batch is filled up from the one before it.

    Args:
        documents: The documents.
        batch_size: Sequences per batch.
        max_length: Tokens per sequence, at most.
        seed: Seed of the order.

    Raises:
        UserError: If there are fewer documents than sequences in a batch.
    """

    PAD_TO = 32

    def __init__(self, documents: Documents, batch_size: int, max_length: int, seed: int) -> None:
        if len(documents) < batch_size:
            raise UserError(
                f"the data set has {len(documents)} examples, fewer than the batch size"
                f" {batch_size}; give more, or a smaller --batch-size."
            )
        self.documents, self.seed = documents, seed
        self.max_steps = max_length - 1
        order = np.argsort(documents.steps, kind="stable")
        starts = [min(i, len(order) - batch_size) for i in range(0, len(order), batch_size)]
        self.batches = [order[i : i + batch_size] for i in starts]

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches that hold all documents."""
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        epoch, index = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.batches_per_epoch)
        chosen = self.batches[int(order[index])]
        steps = np.minimum(self.documents.steps[chosen], self.max_steps)
        length = min(self.PAD_TO * -(-int(steps.max()) // self.PAD_TO), self.max_steps)
        spans = [Span(int(d), 0, int(n)) for d, n in zip(chosen, steps, strict=True)]
        return stack_documents([build_sequence(self.documents, [span], length) for span in spans])
