"""Checkpoints: found, checked, read, converted, quantized and written."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "load": "mlx_rgemma.checkpoints.loading",
    "load_model": "mlx_rgemma.checkpoints.loading",
    "load_tokenizer": "mlx_rgemma.checkpoints.tokenizer",
    "convert": "mlx_rgemma.checkpoints.conversion",
    "save_model": "mlx_rgemma.checkpoints.writing",
}

__all__ = ["convert", "load", "load_model", "load_tokenizer", "save_model"]

if TYPE_CHECKING:
    from mlx_rgemma.checkpoints.conversion import convert
    from mlx_rgemma.checkpoints.loading import load, load_model
    from mlx_rgemma.checkpoints.tokenizer import load_tokenizer
    from mlx_rgemma.checkpoints.writing import save_model


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
