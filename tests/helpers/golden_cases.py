"""The golden data of the operations, case by case."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from helpers.models import golden


@cache
def cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Return the cases of an operation's golden file, each with its arrays by name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in golden(f"ops/{name}.npz").items():
        case, _, field = key.partition("/")
        found.setdefault(case, {})[field] = array
    return found


def arrays(case: dict[str, np.ndarray], *names: str) -> list[mx.array]:
    """Return arrays of a case in float32."""
    return [mx.array(case[name].astype(np.float32)) for name in names]
