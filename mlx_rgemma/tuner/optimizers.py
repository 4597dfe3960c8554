"""mlx-lm's optimizers and schedules of the learning rate, from settings that are checked first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_rgemma.errors import UserError
from mlx_rgemma.ops import backend
from mlx_rgemma.tuner.rules import decays
from mlx_rgemma.tuner.settings import check_keys

OPTIMIZERS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "sgd": "SGD",
    "adafactor": "Adafactor",
}

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
        return optim.MultiOptimizer([kind(rate, **options), kind(rate, **undecayed)], [decays])

    try:
        # Some values are not looked at before an update.
        nothing = {"weight": mx.zeros((2, 2))}
        mx.eval(build().apply_gradients(nothing, nothing))
        return backend.optimizer(build())
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"optimizer_config.{args.optimizer}: does not do ({reason}).") from error


def _options(config: Any, name: str, kind: type) -> dict[str, Any]:
    """What an optimizer is made with, beside the learning rate."""
    check_keys("optimizer_config", config, OPTIMIZERS)
    options = config.get(name) or {}
    known = [key for key in inspect.signature(kind).parameters if key != "learning_rate"]
    check_keys(f"optimizer_config.{name}", options, known)
    return dict(options)


def _schedule(config: Any) -> Callable[[mx.array], mx.array]:
    from mlx_lm.tuner.utils import build_schedule

    check_keys("lr_schedule", config, ("name", "arguments", "warmup", "warmup_init"))
    name, arguments = config.get("name"), config.get("arguments")
    if name not in SCHEDULES:
        raise UserError(f"lr_schedule.name is {name!r}, expected one of {', '.join(SCHEDULES)}.")
    wanted = inspect.signature(getattr(optim.schedulers, name))
    if not isinstance(arguments, list) or not all(map(_is_number, arguments)):
        expected = ", ".join(wanted.parameters)
        raise UserError(f"lr_schedule.arguments is {arguments!r}, expected numbers: {expected}.")
    try:
        wanted.bind(*arguments)
    except TypeError as error:
        raise UserError(f"lr_schedule.arguments of {name}: {error}.") from error
    warmup = config.get("warmup", 0)
    if type(warmup) is not int or warmup < 0:
        raise UserError(f"lr_schedule.warmup is {warmup!r}, expected a number of updates.")
    if not _is_number(start := config.get("warmup_init", 0.0)):
        raise UserError(f"lr_schedule.warmup_init is {start!r}, expected a number.")
    try:
        found: Callable[[mx.array], mx.array] = build_schedule(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_schedule: {' '.join(str(error).split())}") from error
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
