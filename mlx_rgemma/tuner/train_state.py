"""State of a training run: saving, resuming and broadcasting it.

The file, which is written atomically, holds everything that the next step depends on: weights, EMA,
the optimizer's moments and step, the progress, and a fingerprint of data and settings. Data order
and dropout follow from the seed and the iteration, so a resumed run is bit-exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rgemma import distributed
from mlx_rgemma.errors import CheckpointError, UserError, shown
from mlx_rgemma.io.reading import is_integer, is_number
from mlx_rgemma.io.safetensors import load_arrays, save_arrays
from mlx_rgemma.tuner.ema import EMA

FORMAT = "mlx_rgemma training state 1"


@dataclass
class Progress:
    """Progress of a training run.

    Attributes:
        iteration: Completed iterations.
        updates: Completed updates of the weights.
        trained_tokens: Number of targets in all iterations.
        recent_loss: Summed loss since the last report.
        recent_tokens: Number of targets since the last report.
    """

    iteration: int = 0
    updates: int = 0
    trained_tokens: int = 0
    recent_loss: float = 0.0
    recent_tokens: int = 0

    def add(self, loss: float, tokens: int) -> None:
        """Count an iteration."""
        self.iteration += 1
        self.trained_tokens += tokens
        self.recent_loss += loss
        self.recent_tokens += tokens

    def mean_loss(self) -> float:
        """Return the mean loss since the last report, and reset it."""
        mean = self.recent_loss / max(self.recent_tokens, 1)
        self.recent_loss, self.recent_tokens = 0.0, 0
        return mean


class LossState(Protocol):
    """State of a loss that is carried from one batch to the next."""

    def arrays(self) -> dict[str, mx.array]: ...

    def restore(self, arrays: dict[str, mx.array]) -> None: ...


@dataclass
class TrainingState:
    """State of a training run.

    Attributes:
        model: The model; its trainable parameters are part of the state.
        optimizer: The optimizer with its moments, step and learning rate.
        ema: The EMA of the weights, if there is one.
        progress: The progress.
        loss_state: State carried between batches (truncated BPTT), if there is one.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    ema: EMA | None = None
    progress: Progress = field(default_factory=Progress)
    loss_state: LossState | None = None

    def arrays(self) -> dict[str, mx.array]:
        """Return all arrays of the state by name."""
        parts: dict[str, Any] = {
            "model": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
        }
        flat: Any = tree_flatten(parts)
        arrays = dict(flat)
        if self.ema is not None:
            arrays |= {f"ema.{name}": value for name, value in self.ema.weights.items()}
        if self.loss_state is not None:
            found = self.loss_state.arrays()
            arrays |= {f"loss_state.{name}": value for name, value in found.items()}
        return arrays

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Restore the state from `arrays`."""
        groups: dict[str, dict[str, mx.array]] = {
            group: {} for group in ("model", "optimizer", "ema", "loss_state")
        }
        for name, value in arrays.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        self.model.update(tree_unflatten(list(groups["model"].items())))
        self.optimizer.state = tree_unflatten(list(groups["optimizer"].items()))
        if self.ema is not None:
            self.ema.weights = groups["ema"]
        if self.loss_state is not None:
            self.loss_state.restore(groups["loss_state"])


def save_state(path: Path, state: TrainingState, fingerprint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically; an earlier one is replaced.

    Args:
        path: The file.
        state: State of the run.
        fingerprint: Data and settings as JSON values; a resumed run must have the same.

    Raises:
        CheckpointError: If it cannot be written; an earlier file stays.
    """
    metadata = {
        "format": FORMAT,
        "progress": json.dumps(vars(state.progress)),
        "fingerprint": json.dumps(dict(fingerprint), sort_keys=True),
    }
    save_arrays(path, state.arrays(), metadata)


def load_state(path: Path, state: TrainingState, fingerprint: Mapping[str, Any]) -> None:
    """Restore the state of a run from a checkpoint.

    Args:
        path: The file.
        state: State of a new run; it is changed only if the whole checkpoint fits.
        fingerprint: As for `save_state`.

    Raises:
        CheckpointError: If the file is damaged or of another model.
        UserError: If it is of a run with other data or settings.
    """
    arrays, metadata = load_arrays(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of a training run.")
    written, progress = _parsed(path, metadata)
    _compare(path, written, json.loads(json.dumps(dict(fingerprint))))
    _check_shapes(path, arrays, state)
    state.restore(arrays)
    state.progress = progress
    mx.eval(list(arrays.values()))


def _parsed(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], Progress]:
    """Return the fingerprint and the progress of a checkpoint, checked."""
    try:
        fingerprint: Any = json.loads(metadata["fingerprint"])
        values: Any = json.loads(metadata["progress"])
        progress = Progress(**values)
        counts = dict(vars(progress))
        sound = isinstance(fingerprint, dict) and is_number(counts.pop("recent_loss"), 0, 1e30)
        sound = sound and all(is_integer(count, 0, 1 << 60) for count in counts.values())
    except (KeyError, TypeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: its metadata is damaged; delete the file to start over.")
    return fingerprint, progress


def _compare(path: Path, written: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    for key in sorted({*written, *current}):
        if written.get(key) != current.get(key):
            raise UserError(
                f"{path}: was written by a run with {shown(key)[1:-1]} ="
                f" {shown(written.get(key))}, this one has {shown(current.get(key))}; resume with"
                " the same data and settings, or name another folder to start over."
            )


def _check_shapes(path: Path, arrays: Mapping[str, mx.array], state: TrainingState) -> None:
    state.optimizer.init(state.model.trainable_parameters())
    expected = state.arrays()
    for name in sorted({*arrays, *expected}):
        found, wanted = arrays.get(name), expected.get(name)
        if found is None or wanted is None or _kind(found) != _kind(wanted):
            there = "missing" if found is None else _kind(found)
            needs = "not part of this run" if wanted is None else f"{_kind(wanted)} here"
            raise CheckpointError(f"{path}: {shown(name)} is {there}, {needs}.")


def _kind(value: mx.array) -> str:
    return f"{str(value.dtype).removeprefix('mlx.core.')} {list(value.shape)}"


def check_batch_size(batch_size: int, group: mx.distributed.Group | None) -> None:
    """Refuse a batch of fewer sequences than ranks.

    Raises:
        UserError: If it has fewer.
    """
    if group is not None and batch_size < group.size():
        raise UserError(
            f"a batch of {batch_size} sequences cannot be split by {group.size()} ranks; give a"
            f" --batch-size of at least {group.size()}, or start fewer processes."
        )


def broadcast_initial_state(
    state: TrainingState,
    fingerprint: Mapping[str, Any],
    load: Callable[[], None] | None,
    group: mx.distributed.Group | None,
) -> None:
    """Broadcast the state of rank 0, which alone needs the files.

    Args:
        state: State of a new run.
        fingerprint: Data and settings, as for `save_state`.
        load: Loads a checkpoint into the state; None for a new run.
        group: The ranks; None for a single process.

    Raises:
        UserError: If a rank has other data or settings than rank 0, or `load` fails.
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
            f"rank {group.rank()} has another {', '.join(other)} than rank 0; give all ranks the"
            " same data and settings."
        )
    if load is not None:
        distributed.run_on_rank0(load, group)
    arrays = state.arrays()
    names, state.progress = distributed.broadcast_object((list(arrays), state.progress), group)
    values = distributed.broadcast(list(arrays.values()), group)
    state.restore(dict(zip(names, values, strict=True)))


def _same(key: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return key in expected and key in found and expected[key] == found[key]
