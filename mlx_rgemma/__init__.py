"""RecurrentGemma (Griffin) on Apple's MLX: exact, fast, in constant memory.

    from mlx_rgemma import load, generate

    model, tokenizer = load()  # the embedded model; or a folder, or a Hub repository
    print(generate(model, tokenizer, "Once upon a time", max_tokens=100))

Everything is imported on first use, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if sys.platform == "linux":
    # Threads of NumPy's OpenBLAS spin for 2^26 cycles after a product, on cores that others need.
    # After 2^16 they sleep. Read when NumPy is first imported.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")

_LAZY_IMPORTS = {
    "load": "mlx_rgemma.checkpoints.load",
    "load_model": "mlx_rgemma.checkpoints.load",
    "convert": "mlx_rgemma.checkpoints.convert",
    "generate": "mlx_rgemma.generation.api",
    "stream_generate": "mlx_rgemma.generation.api",
    "batch_generate": "mlx_rgemma.generation.batch",
    "Session": "mlx_rgemma.sessions.session",
    "Conversation": "mlx_rgemma.sessions.conversation",
    "load_prompt_cache": "mlx_rgemma.sessions.prompt_cache",
    "save_prompt_cache": "mlx_rgemma.sessions.prompt_cache",
    "register": "mlx_rgemma.register",
    "GriffinConfig": "mlx_rgemma.griffin.config",
    "Model": "mlx_rgemma.griffin.model",
}

__all__ = [
    "Conversation",
    "GriffinConfig",
    "Model",
    "Session",
    "__version__",
    "batch_generate",
    "convert",
    "generate",
    "load",
    "load_model",
    "load_prompt_cache",
    "ops",
    "register",
    "save_prompt_cache",
    "stream_generate",
]

if TYPE_CHECKING:
    from mlx_rgemma import ops
    from mlx_rgemma.checkpoints.convert import convert
    from mlx_rgemma.checkpoints.load import load, load_model
    from mlx_rgemma.generation.api import generate, stream_generate
    from mlx_rgemma.generation.batch import batch_generate
    from mlx_rgemma.griffin.config import GriffinConfig
    from mlx_rgemma.griffin.model import Model
    from mlx_rgemma.register import register
    from mlx_rgemma.sessions.conversation import Conversation
    from mlx_rgemma.sessions.prompt_cache import load_prompt_cache, save_prompt_cache
    from mlx_rgemma.sessions.session import Session


def __getattr__(name: str) -> Any:
    if name in _LAZY_IMPORTS:
        value = getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)
        globals()[name] = value
        return value
    if name == "ops":
        return importlib.import_module("mlx_rgemma.ops")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """A package whose functions are not replaced by submodules of the same name.

    `generate` and `convert` are functions of the package and modules for `python -m`. The import
    system would bind the modules to these names.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _LAZY_IMPORTS and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
