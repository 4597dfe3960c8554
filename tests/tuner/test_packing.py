"""Documents in rows: nothing lost, nothing mixed, in an order that the step alone decides."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.data.batches import (
    ConcatDataset,
    DataLoader,
    MixtureDataset,
    PackedDataset,
    PaddedBatches,
)
from mlx_rgemma.tuner.data.packing import Documents, best_fit_pack, build_sequence

TEXTS = st.lists(st.lists(st.integers(4, 99), min_size=0, max_size=40), min_size=1, max_size=12)


def steps_of(documents) -> list[tuple[int, int]]:
    """All (token, next token) pairs of some documents, sorted."""
    return sorted(pair for d in documents for pair in itertools.pairwise(d))


def steps_in(rows) -> list[tuple[int, int]]:
    """The pairs that count in some rows, sorted."""
    return sorted(
        (int(t), int(n))
        for tokens, targets, mask, _ in rows
        for t, n in zip(tokens[mask > 0], targets[mask > 0], strict=True)
    )


def pieces_in(row) -> list[list[int]]:
    """The tokens of each piece of a row, padding left out."""
    tokens, _, mask, positions = row
    starts = np.flatnonzero(positions == 0)
    return [
        tokens[a:b][mask[a:b] > 0].tolist()
        for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)
        if mask[a:b].any()
    ]


def is_part(piece, document) -> bool:
    return any(piece == document[i : i + len(piece)] for i in range(len(document)))


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 25))
def test_whole_rows_hold_each_step_once(texts, sequence_length):
    documents = Documents.of(texts)
    rows = [
        build_sequence(documents, p, sequence_length)
        for p in best_fit_pack(documents.steps, sequence_length)
    ]
    assert steps_in(rows) == steps_of(texts)
    for row in rows:
        for piece in pieces_in(row):
            assert any(is_part(piece, text) for text in texts)
    for text in texts:  # a document that fits is not cut
        if 2 <= len(text) <= sequence_length + 1:
            assert any(text[:-1] == piece for row in rows for piece in pieces_in(row))


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 25), st.integers(0, 5))
def test_streamed_rows_are_full_and_hold_each_step_once_an_epoch(texts, sequence_length, seed):
    documents = Documents.of(texts)
    total = int(documents.steps.sum())
    if total < sequence_length:
        with pytest.raises(
            UserError, match=f"{total} tokens, fewer than one sequence of {sequence_length}"
        ):
            ConcatDataset(documents, sequence_length, seed)
        return
    rows = ConcatDataset(documents, sequence_length, seed)
    for epoch in (0, 1):
        first = epoch * rows.sequences_per_epoch
        read = [rows[first + i] for i in range(rows.sequences_per_epoch)]
        assert all((row[2] == 1).all() for row in read)
        found, wanted = steps_in(read), steps_of(texts)
        for pair in found:
            wanted.remove(pair)
        assert len(wanted) == total % sequence_length
        for row in read:
            assert all(any(is_part(p, text) for text in texts) for p in pieces_in(row))


def test_prompts_are_read_and_not_predicted():
    documents = Documents.of([[5, 6, 7, 8], [9, 10, 11]], first_targets=[3, 1])
    (pieces,) = best_fit_pack(documents.steps, 8)
    tokens, targets, mask, positions = build_sequence(documents, pieces, 8)
    assert tokens.tolist() == [5, 6, 7, 9, 10, 0, 0, 0]
    assert targets.tolist() == [6, 7, 8, 10, 11, 0, 0, 0]
    assert mask.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def sources() -> list[ConcatDataset]:
    rng = np.random.default_rng(0)
    return [
        ConcatDataset(
            Documents.of([rng.integers(lo, lo + 9, 15).tolist() for _ in range(20)]), 10, lo
        )
        for lo in (10, 20, 30)
    ]


def test_the_order_is_a_function_of_the_step_alone():
    def batches():
        return DataLoader(MixtureDataset(sources(), [1, 2, 3], seed=4), batch_size=3)

    forwards = [np.array(batches().dataset[i]) for i in range(300)]
    one = batches()
    for step in reversed(range(100)):
        assert (
            np.array(one[step].tokens) == np.stack(forwards[3 * step : 3 * step + 3])[:, 0]
        ).all()


def test_sources_get_their_shares():
    rows = MixtureDataset(sources(), [60, 30, 10], seed=1)
    counts = np.bincount([int(rows[i][0].min()) // 10 for i in range(2000)], minlength=4)
    assert counts.tolist() == [0, 1200, 600, 200]
    # ... and each source's rows come in its own order, none left out.
    second = [row for row in (rows[i] for i in range(2000)) if row[0].min() // 10 == 2]
    assert all((row == sources()[1][i]).all() for i, row in enumerate(second))


def test_processes_share_rows():
    batch = DataLoader(sources()[0], batch_size=5)[3]
    shares = [batch.shard(rank, 2) for rank in (0, 1)]
    assert [share.shape for share in shares] == [(3, 10), (2, 10)]
    joined = mx.concatenate([share.targets for share in shares])
    assert (joined[mx.array([0, 3, 1, 4, 2])] == batch.targets).all()
    with pytest.raises(ValueError, match="5 sequences cannot be split by 6 ranks"):
        batch.shard(0, 6)


def test_whole_rows_are_shuffled_anew_in_each_epoch():
    documents = Documents.of([[i] * 7 for i in range(4, 40)])
    rows = PackedDataset(documents, 6, seed=0)
    epochs = [
        [int(rows[e * rows.sequences_per_epoch + i][0, 0]) for i in range(rows.sequences_per_epoch)]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(4, 40))
    assert epochs[0] != epochs[1]


def test_padded_batches_hold_like_lengths():
    rng = np.random.default_rng(1)
    texts = [rng.integers(4, 99, int(n)).tolist() for n in rng.integers(5, 200, 40)]
    batches = PaddedBatches(Documents.of(texts), 4, max_length=150, seed=0)
    read = [batches[i] for i in range(batches.batches_per_epoch)]
    assert {batch.shape[1] % 32 for batch in read} <= {0, 149 % 32}
    assert all(batch.segment_pos is None for batch in read)  # one document a row
    longest = max(batch.shape[1] for batch in read)
    assert longest == 149
    lengths = [np.array(batch.mask).sum(axis=1) for batch in read]
    assert sorted(int(n) for row in lengths for n in row) == sorted(
        min(len(text), 150) - 1 for text in texts
    )
    order = sorted(lengths, key=lambda n: n.max())
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(order))
