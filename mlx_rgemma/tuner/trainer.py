"""The training loop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.parameters import A_PARAM
from mlx_rgemma.tuner.data.batches import Batches
from mlx_rgemma.tuner.data.packing import Batch
from mlx_rgemma.tuner.train_state import Progress, TrainingState

Loss = Callable[[Any, Batch], tuple[mx.array, mx.array]]
"""(model, batch) -> (summed loss of the targets, fp32; number of targets)."""


class TrainingCallback:
    """Receiver of training reports, with mlx-lm's keys; mlx-lm's callbacks work too."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Receive a report, every `steps_per_report` iterations."""

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Receive the result of an evaluation."""


@dataclass(frozen=True)
class LoopSettings:
    """Length of a run and its intervals; the names are mlx-lm's.

    Attributes:
        iters: Iterations of the run, one batch each.
        grad_accumulation_steps: Iterations per update of the weights.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        steps_per_report: Iterations between two reports.
        steps_per_eval: Iterations between two evaluations.
        steps_per_save: Iterations between two checkpoints.
        seed: Seed of dropout.
    """

    iters: int
    grad_accumulation_steps: int = 1
    max_grad_norm: float = 0.0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    steps_per_save: int = 100
    seed: int = 0

    @classmethod
    def of(cls, settings: Any, **others: Any) -> LoopSettings:
        """Take settings from attributes of the same names; the others keep their defaults."""
        names = {field.name for field in fields(cls)}
        found = {name: value for name, value in vars(settings).items() if name in names}
        return cls(**{**found, **others})


def fit(
    state: TrainingState,
    batches: Batches,
    settings: LoopSettings,
    loss: Loss,
    *,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    save: Callable[[TrainingState], None] | None = None,
    callback: TrainingCallback | None = None,
    group: mx.distributed.Group | None = None,
    compute_dtype: mx.Dtype | None = None,
) -> None:
    """Train the trainable parameters of a model for `settings.iters` iterations.

    The loss of an update is the mean over all targets of its iterations and ranks:
    ``sum of losses / number of targets``. Ctrl-C and SIGTERM end the run after the current update,
    with a checkpoint; a second Ctrl-C ends it at once.

    Args:
        state: State of the run, new or from a checkpoint.
        batches: Iteration i reads ``batches[i]``.
        settings: Length and intervals.
        loss: Loss of a batch.
        evaluate: Evaluates the model on the validation set; returns a report with `val_loss`.
            Called before the first iteration, every `steps_per_eval` iterations and at the end.
        save: Writes a checkpoint. Called after an update only.
        callback: Receives the reports.
        group: Ranks that split every batch. All of them must call this function with the same
            arguments; only rank 0 needs `save` and `callback`.
        compute_dtype: dtype of the weights in computation (but for the RG-LRU's Lambda); trained
            weights and accumulated gradients keep theirs.

    Raises:
        UserError: If the loss becomes NaN or infinite.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint is written.
    """
    Loop(state, batches, settings, loss, group, compute_dtype).run(evaluate, save, callback)


class Loop:
    """The training loop; see `fit`."""

    def __init__(
        self,
        state: TrainingState,
        batches: Batches,
        settings: LoopSettings,
        loss: Loss,
        group: mx.distributed.Group | None,
        compute_dtype: mx.Dtype | None,
    ) -> None:
        self.state, self.batches, self.settings = state, batches, settings
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.group = group
        model = state.model

        def loss_of(parameters: Any, batch: Batch) -> tuple[mx.array, mx.array]:
            model.update(cast_weights(parameters, compute_dtype))
            return loss(model, batch)

        self.gradients = mx.value_and_grad(loss_of)
        self.sums: Any = None
        self.update_tokens = 0.0

    def run(
        self,
        evaluate: Callable[[], dict[str, Any]] | None,
        save: Callable[[TrainingState], None] | None,
        callback: TrainingCallback | None,
    ) -> None:
        """Train to the end."""
        settings, progress = self.settings, self.state.progress
        report = _Report(settings, self.state.optimizer)
        saved = progress.iteration
        if evaluate is not None and progress.iteration == 0:
            self._evaluate(evaluate, callback)
        with interruptible() as interrupted:
            while progress.iteration < settings.iters:
                iteration = progress.iteration + 1
                last = iteration == settings.iters
                updates = last or iteration % settings.grad_accumulation_steps == 0
                started = time.perf_counter()
                loss, tokens = self.step(progress.iteration, update=updates)
                progress.add(loss, tokens)
                report.add(tokens, time.perf_counter() - started)
                if (last or iteration % settings.steps_per_report == 0) and callback is not None:
                    callback.on_train_loss_report(report.info(progress))
                if (last or iteration % settings.steps_per_eval == 0) and evaluate is not None:
                    self._evaluate(evaluate, callback)
                due = iteration // settings.steps_per_save > saved // settings.steps_per_save
                stop = updates and self._any(interrupted())
                if save is not None and updates and (last or due or stop):
                    save(self.state)
                    saved = iteration
                if stop and not last:
                    self._any(False)  # wait until rank 0 has written its checkpoint
                    raise KeyboardInterrupt

    def step(self, iteration: int, *, update: bool) -> tuple[float, int]:
        """Compute the gradients of one batch, and update the weights if `update`.

        Returns:
            The summed loss of its targets and their number, over all ranks.
        """
        model = self.state.model
        model.train()
        seed = np.random.SeedSequence([self.settings.seed, iteration, self.rank])
        mx.random.seed(int(seed.generate_state(1, np.uint64)[0]))
        batch = self.batches[iteration].shard(self.rank, self.size)
        parameters = model.trainable_parameters()
        (loss, tokens), gradients = self.gradients(parameters, batch)
        model.update(parameters)
        if self.sums is not None:
            gradients = tree_map(mx.add, self.sums, gradients)
        elif self.settings.grad_accumulation_steps > 1:
            # Accumulate in float32: bfloat16 sums lose small gradients.
            gradients = tree_map(lambda g: g.astype(mx.float32), gradients)
        self.sums = gradients
        del parameters, gradients  # so that an update frees the arrays it replaces
        mx.eval(self.sums, loss, tokens)
        sums = mx.stack([loss.astype(mx.float32), tokens.astype(mx.float32)])
        if self.size > 1:
            sums = mx.distributed.all_sum(sums, group=self.group, stream=mx.cpu)
        totals: Any = sums.tolist()
        batch_loss, batch_tokens = totals
        if not math.isfinite(batch_loss):
            raise UserError(
                f"the loss became {batch_loss} at iteration {iteration + 1}; try a lower learning"
                " rate, or rerun from the last checkpoint."
            )
        self.update_tokens += batch_tokens
        if update:
            self._update()
        return batch_loss, int(batch_tokens)

    def _update(self) -> None:
        state = self.state
        gradients, self.sums = self.sums, None
        if self.size > 1:
            gradients = nn.average_gradients(gradients, self.group)
        # The mean over ranks times their number is the sum.
        scale = self.size / max(self.update_tokens, 1.0)
        gradients = tree_map(lambda g: g * scale, gradients)
        if self.settings.max_grad_norm:
            gradients, _ = optim.clip_grad_norm(gradients, self.settings.max_grad_norm)
        state.optimizer.update(state.model, gradients)
        del gradients  # frees memory for the update
        state.progress.updates += 1
        if state.ema is not None:
            state.ema.update(state.model, state.progress.updates)
        mx.async_eval(state.arrays())  # overlaps with preparing the next batch
        self.update_tokens = 0.0

    def _evaluate(
        self, evaluate: Callable[[], dict[str, Any]], callback: TrainingCallback | None
    ) -> None:
        started = time.perf_counter()
        self.state.model.eval()
        found = evaluate()
        self.state.model.train()
        if callback is not None:
            seconds = time.perf_counter() - started
            iteration = self.state.progress.iteration
            callback.on_val_loss_report({"iteration": iteration, **found, "val_time": seconds})

    def _any(self, here: bool) -> bool:
        """Return whether any rank was interrupted: all stop together."""
        if self.size == 1:
            return here
        count = mx.distributed.all_sum(mx.array(float(here)), group=self.group, stream=mx.cpu)
        return bool((count > 0).item())


class _Report:
    """Loss and speed since the last report or a resume."""

    def __init__(self, settings: LoopSettings, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.seconds = 0.0
        self.tokens = self.iterations = 0

    def add(self, tokens: int, seconds: float) -> None:
        self.seconds += seconds
        self.tokens, self.iterations = self.tokens + tokens, self.iterations + 1

    def info(self, progress: Progress) -> dict[str, Any]:
        """Return the report with mlx-lm's keys, and reset the counters."""
        info = {
            "iteration": progress.iteration,
            "train_loss": progress.mean_loss(),
            "learning_rate": float(self.optimizer.learning_rate.item()),
            "iterations_per_second": self.iterations / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "trained_tokens": progress.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self.seconds = 0.0
        self.tokens = self.iterations = 0
        return info


def cast_weights(parameters: Any, dtype: mx.Dtype | None) -> Any:
    """Return weights in another dtype; the RG-LRU's Lambda keeps its own."""
    if dtype is None:
        return parameters
    if isinstance(parameters, dict):
        return {
            name: value if name == A_PARAM else cast_weights(value, dtype)
            for name, value in parameters.items()
        }
    if isinstance(parameters, list):
        return [cast_weights(value, dtype) for value in parameters]
    return parameters.astype(dtype)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C and SIGTERM instead of raising at once; a second Ctrl-C raises.

    Yields:
        A function that returns whether there was one.
    """
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen = True

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
