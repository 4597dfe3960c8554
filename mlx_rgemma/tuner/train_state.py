"""The state of a training run as one file, which appears whole or not at all.

The file holds all that the next step depends on: weights, their average, the optimizer's moments
and step, how far the run is, and what it read and was told (`fingerprint`). Data order and dropout
follow from the seed and the iteration, so nothing else is needed for a run that goes on as if it
had never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rgemma.adapters.files import is_number, is_whole
from mlx_rgemma.errors import CheckpointError, UserError, shown
from mlx_rgemma.io.arrays import load_arrays, save_arrays
from mlx_rgemma.tuner.ema import EMA

FORMAT = "mlx_rgemma training state 1"


@dataclass
class Progress:
    """How far a training run is.

    Attributes:
        iteration: Iterations done.
        updates: Updates of the weights done.
        trained_tokens: Targets that counted, in all iterations.
        recent_loss, recent_tokens: Sums since the last report: of losses, and of targets.
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
        """Of the targets since the last report; begins anew."""
        mean = self.recent_loss / max(self.recent_tokens, 1)
        self.recent_loss, self.recent_tokens = 0.0, 0
        return mean


class Carried(Protocol):
    """What is handed from one batch to the next beside the weights."""

    def arrays(self) -> dict[str, mx.array]: ...

    def restore(self, arrays: dict[str, mx.array]) -> None: ...


@dataclass
class TrainingState:
    """What a run changes while it goes on.

    Attributes:
        model: Its trainable parameters are the state.
        optimizer: Its moments, step and learning rate.
        average: The average of the weights, if one is kept.
        progress: How far the run is.
        carried: The model's state at the end of the last batch, if the next one goes on from it.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    average: EMA | None = None
    progress: Progress = field(default_factory=Progress)
    carried: Carried | None = None

    def arrays(self) -> dict[str, mx.array]:
        """All arrays of the state, by name."""
        parts: dict[str, Any] = {
            "model": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
        }
        flat: Any = tree_flatten(parts)
        arrays = dict(flat)
        if self.average is not None:
            arrays |= {f"average.{name}": value for name, value in self.average.weights.items()}
        if self.carried is not None:
            arrays |= {f"carried.{name}": value for name, value in self.carried.arrays().items()}
        return arrays

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over what `arrays` gave."""
        groups: dict[str, dict[str, mx.array]] = {
            group: {} for group in ("model", "optimizer", "average", "carried")
        }
        for name, value in arrays.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        self.model.update(tree_unflatten(list(groups["model"].items())))
        self.optimizer.state = tree_unflatten(list(groups["optimizer"].items()))
        if self.average is not None:
            self.average.weights = groups["average"]
        if self.carried is not None:
            self.carried.restore(groups["carried"])


def save_state(path: Path, state: TrainingState, fingerprint: Mapping[str, Any]) -> None:
    """Write a checkpoint over the one before, in one step.

    Args:
        path: The file.
        state: The run.
        fingerprint: What the run reads and was told, JSON values: a resumed run must have the same.

    Raises:
        CheckpointError: If it cannot be written; the file that was there stays.
    """
    metadata = {
        "format": FORMAT,
        "progress": json.dumps(vars(state.progress)),
        "fingerprint": json.dumps(dict(fingerprint), sort_keys=True),
    }
    save_arrays(path, state.arrays(), metadata)


def load_state(path: Path, state: TrainingState, fingerprint: Mapping[str, Any]) -> None:
    """Go on where a checkpoint was written.

    Args:
        path: The file.
        state: A run that has not begun; it is changed only if all of the checkpoint fits.
        fingerprint: As for `save_state`.

    Raises:
        CheckpointError: If the file is damaged, or no checkpoint of such a model.
        UserError: If the run that wrote it read other data or had other settings.
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
        sound = sound and all(is_whole(count, 0, 1 << 60) for count in counts.values())
    except (KeyError, TypeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: its metadata is damaged; delete it to begin anew.")
    return fingerprint, progress


def _compare(path: Path, written: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    for key in sorted({*written, *current}):
        if written.get(key) != current.get(key):
            raise UserError(
                f"{path}: was written by a run with {shown(key)[1:-1]} ="
                f" {shown(written.get(key))}, this one has {shown(current.get(key))}; go on with"
                " the same data and settings, or name another folder to begin anew."
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
