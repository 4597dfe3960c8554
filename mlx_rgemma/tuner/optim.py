"""Optimizers and learning-rate schedules: this package's for `train`, mlx-lm's for `lora`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.griffin.parameters import uses_weight_decay
from mlx_rgemma.io.reading import is_integer, is_number, reason
from mlx_rgemma.ops import backend
from mlx_rgemma.tuner.config import MAX_COUNT, MAX_RATE, check_keys

DECAYS = ("cosine", "linear", "constant")

OPTIMIZERS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "sgd": "SGD",
    "adafactor": "Adafactor",
}

RANGES = {"betas": (0.0, 1.0), "momentum": (0.0, 1.0), "ns_steps": (1, 100)}
"""Bounds of an optimizer's options; others are bounded by `MAX_RATE`."""

SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")


def use_weight_decay(name: str, value: mx.array) -> bool:
    """Return whether weight decay applies to a parameter, for `MultiOptimizer`."""
    return uses_weight_decay(name, value.ndim)


def learning_rate_schedule(
    peak: float, steps: int, *, warmup: int = 0, decay: str = "cosine", end: float = 0.0
) -> Callable[[mx.array], mx.array]:
    """Return a schedule of linear warmup and decay to `end`.

    Args:
        peak: The highest learning rate, reached after `warmup` updates.
        steps: Updates of the whole run.
        warmup: Updates of the warmup.
        decay: "cosine", "linear" or "constant".
        end: The learning rate after the last update.

    Raises:
        ValueError: If the decay is unknown.
    """
    if decay not in DECAYS:
        raise ValueError(f"[schedule] decay is {decay!r}, expected one of {', '.join(DECAYS)}.")

    def schedule(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)
        rise = mx.minimum((step + 1) / max(warmup, 1), 1.0) if warmup else mx.array(1.0)
        share = mx.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if decay == "cosine":
            fall = 0.5 * (1.0 + mx.cos(math.pi * share))
        elif decay == "linear":
            fall = 1.0 - share
        else:
            fall = mx.array(1.0)
        return rise * (end + (peak - end) * fall)

    return schedule


def adamw(
    learning_rate: Any, *, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
) -> optim.Optimizer:
    """Return AdamW with bias correction and weight decay by `use_weight_decay`.

    Args:
        learning_rate: A number, or a function of the update's index.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        betas: Decay rates of the two moments.
    """

    def group(decay: float) -> optim.Optimizer:
        return optim.AdamW(
            learning_rate, betas=list(betas), weight_decay=decay, bias_correction=True
        )

    return backend.optimizer(
        optim.MultiOptimizer([group(weight_decay), group(0.0)], [use_weight_decay])
    )


def make_optimizer(args: SimpleNamespace) -> optim.Optimizer:
    """Return mlx-lm's optimizer for the settings, with weight decay by `use_weight_decay`.

    Args:
        args: `optimizer`, `optimizer_config` (options by optimizer), `learning_rate` or
            `lr_schedule` (`name`, `arguments`, `warmup` and `warmup_init`).

    Raises:
        UserError: If an option of the optimizer or the schedule is wrong.
    """
    kind = getattr(optim, OPTIMIZERS[args.optimizer])
    options = _options(args.optimizer_config or {}, args.optimizer, kind)
    rate = _schedule(args.lr_schedule) if args.lr_schedule else args.learning_rate

    def build() -> optim.Optimizer:
        if args.optimizer != "adamw":
            found: optim.Optimizer = kind(learning_rate=rate, **options)
            return found
        undecayed = {**options, "weight_decay": 0.0}
        return optim.MultiOptimizer(
            [kind(rate, **options), kind(rate, **undecayed)], [use_weight_decay]
        )

    try:
        # Try an update: some options are not checked before.
        zero = {"q_proj": mx.zeros((2, 2))}
        mx.eval(build().apply_gradients(zero, zero))
        return backend.optimizer(build())
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"optimizer_config.{args.optimizer}: is refused by MLX ({reason(error)})."
        ) from error


def _options(config: Any, name: str, kind: type) -> dict[str, Any]:
    """Return the options of an optimizer, but for the learning rate."""
    check_keys("optimizer_config", config, OPTIMIZERS)
    options = config.get(name) or {}
    known = [key for key in inspect.signature(kind).parameters if key != "learning_rate"]
    check_keys(f"optimizer_config.{name}", options, known)
    for key, value in options.items():
        _check_option(f"optimizer_config.{name}.{key}", key, value)
    return dict(options)


def _check_option(where: str, key: str, value: Any) -> None:
    """Refuse a value that no optimizer accepts, before it reaches MLX."""
    low, high = RANGES.get(key, (-MAX_RATE, MAX_RATE))
    numbers = value if isinstance(value, list) else [value]
    switch = value is None or isinstance(value, bool)
    if not switch and not all(is_number(number, low, high) for number in numbers):
        raise UserError(f"{where} is {shown(value)}, expected a number from {low:g} to {high:g}.")


def _schedule(config: Any) -> Callable[[mx.array], mx.array]:
    from mlx_lm.tuner.utils import build_schedule

    check_keys("lr_schedule", config, ("name", "arguments", "warmup", "warmup_init"))
    name, arguments = config.get("name"), config.get("arguments")
    if name not in SCHEDULES:
        raise UserError(
            f"lr_schedule.name is {shown(name)}, expected one of {', '.join(SCHEDULES)}."
        )
    wanted = inspect.signature(getattr(optim.schedulers, name))
    numbers = isinstance(arguments, list) and all(is_number(a, 0, MAX_RATE) for a in arguments)
    if not numbers:
        raise UserError(
            f"lr_schedule.arguments is {shown(arguments)}, expected numbers:"
            f" {', '.join(wanted.parameters)}."
        )
    try:
        wanted.bind(*arguments)
    except TypeError as error:
        raise UserError(f"lr_schedule.arguments of {name}: {error}.") from error
    warmup = config.get("warmup", 0)
    if not is_integer(warmup, 0, MAX_COUNT):
        raise UserError(f"lr_schedule.warmup is {shown(warmup)}, expected a number of updates.")
    if not is_number(start := config.get("warmup_init", 0.0), 0, MAX_RATE):
        raise UserError(f"lr_schedule.warmup_init is {shown(start)}, expected a number.")
    try:
        found: Callable[[mx.array], mx.array] = build_schedule(config)
        rates = [found(mx.array(step)).item() for step in (0, 1, warmup, warmup + 1000)]
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"lr_schedule: {reason(error)}") from error
    if not all(is_number(rate, 0, MAX_RATE) for rate in rates):
        raise UserError(f"lr_schedule: learning rates are {rates}, expected numbers from 0.")
    return found
