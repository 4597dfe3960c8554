"""Training by several processes: all begin alike, and share the rows of every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_rgemma import distributed
from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.train_state import TrainingState


def check_rows(batch_size: int, group: mx.distributed.Group | None) -> None:
    """Refuse a batch that does not have a row for every process.

    Raises:
        UserError: If it has fewer.
    """
    if group is not None and batch_size < group.size():
        raise UserError(
            f"a batch of {batch_size} rows cannot be shared by {group.size()} processes; give a"
            f" --batch-size of {group.size()} or more, or start fewer processes."
        )


def broadcast_initial_state(
    state: TrainingState,
    fingerprint: Mapping[str, Any],
    load: Callable[[], None] | None,
    group: mx.distributed.Group | None,
) -> None:
    """Give all processes the first one's state; only the first one needs the files.

    Args:
        state: A run that has not begun.
        fingerprint: What the run reads and was told, as it goes into its checkpoints.
        load: Puts a checkpoint into the state; None for a new run.
        group: The processes; None for one.

    Raises:
        UserError: If a process has other data or settings than the first one, or `load` refuses.
    """
    if group is None:
        if load is not None:
            load()
        return
    expected = distributed.broadcast_object(dict(fingerprint), group)
    other = [
        key for key in sorted({*expected, *fingerprint}) if not _same(key, expected, fingerprint)
    ]
    if other:
        raise UserError(
            f"rank {group.rank()} has another {', '.join(other)} than rank 0; give all processes"
            " the same data and settings."
        )
    if load is not None:
        distributed.run_on_rank0(load, group)
    arrays = state.arrays()
    names, state.progress = distributed.broadcast_object((list(arrays), state.progress), group)
    values = distributed.broadcast(list(arrays.values()), group)
    state.restore(dict(zip(names, values, strict=True)))


def _same(key: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return key in expected and key in found and expected[key] == found[key]
