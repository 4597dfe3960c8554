"""mlx-lm's optimizers and schedules of the learning rate, from settings that are checked first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_rgemma.adapters.files import is_number, is_whole
from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.ops import backend
from mlx_rgemma.tuner.config import MAX_COUNT, MAX_RATE, check_keys
from mlx_rgemma.tuner.optim import use_weight_decay

OPTIMIZERS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "sgd": "SGD",
    "adafactor": "Adafactor",
}

RANGES = {"betas": (0.0, 1.0), "momentum": (0.0, 1.0), "ns_steps": (1, 100)}
"""Of an optimizer's options; others are numbers of any size."""

SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")


def make_optimizer(args: SimpleNamespace) -> optim.Optimizer:
    """The optimizer that the settings name; weight decay keeps to `rules.decays`.

    Args:
        args: `optimizer`, `optimizer_config` (options by optimizer), `learning_rate`, and
            `lr_schedule` instead of it: `name`, `arguments`, `warmup` and `warmup_init`.

    Raises:
        UserError: If an optimizer or a schedule does not take what is given.
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
        # Some values are not looked at before an update.
        nothing = {"weight": mx.zeros((2, 2))}
        mx.eval(build().apply_gradients(nothing, nothing))
        return backend.optimizer(build())
    except (TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"optimizer_config.{args.optimizer}: does not do ({reason}).") from error


def _options(config: Any, name: str, kind: type) -> dict[str, Any]:
    """What an optimizer is made with, beside the learning rate."""
    check_keys("optimizer_config", config, OPTIMIZERS)
    options = config.get(name) or {}
    known = [key for key in inspect.signature(kind).parameters if key != "learning_rate"]
    check_keys(f"optimizer_config.{name}", options, known)
    for key, value in options.items():
        _check_option(f"optimizer_config.{name}.{key}", key, value)
    return dict(options)


def _check_option(where: str, key: str, value: Any) -> None:
    """Refuse a value that no optimizer takes, before it reaches MLX."""
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
    if not is_whole(warmup, 0, MAX_COUNT):
        raise UserError(f"lr_schedule.warmup is {shown(warmup)}, expected a number of updates.")
    if not is_number(start := config.get("warmup_init", 0.0), 0, MAX_RATE):
        raise UserError(f"lr_schedule.warmup_init is {shown(start)}, expected a number.")
    try:
        found: Callable[[mx.array], mx.array] = build_schedule(config)
        rates = [found(mx.array(step)).item() for step in (0, 1, warmup, warmup + 1000)]
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"lr_schedule: {' '.join(str(error).split())[:200]}") from error
    if not all(is_number(rate, 0, MAX_RATE) for rate in rates):
        raise UserError(f"lr_schedule: learning rates are {rates}, expected numbers from 0.")
    return found
