"""Tolerances, and the distances that are compared with them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

ON_GPU = mx.default_device() == mx.Device(mx.gpu)
"""On a Mac the same tests run on its GPU, with validated kernels."""

LOGITS_ATOL = 2e-4 if ON_GPU else 5e-5
"""float32 logits against Google's code, which is itself within 1.4e-5 of float64. A GPU may
multiply float32 matrices in reduced precision."""


def tolerance(on_cpu: float) -> float:
    """Return a relative tolerance of float32 results; looser on a GPU, for the same reason."""
    return max(on_cpu, 1e-3) if ON_GPU else on_cpu


def max_error(actual: mx.array | np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference."""
    return float(np.abs(np.array(actual, dtype=np.float64) - expected).max())


def relative_error(actual: mx.array | np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest expected value."""
    scale = float(np.abs(expected).max())
    return max_error(actual, expected) / (scale if scale > 0 else 1.0)
