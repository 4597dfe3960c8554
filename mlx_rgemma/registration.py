"""Making mlx-lm use this package's model and caches."""

from __future__ import annotations

import sys
from types import ModuleType

MODULE = "mlx_lm.models.recurrent_gemma"


def register() -> None:
    """Make mlx-lm run RecurrentGemma with this package's class.

    Afterwards `mlx_lm.load`, `generate`, `server`, `lora`, `fuse`, the quantizers and prompt-cache
    files all use it. Calling it again does nothing; nothing is patched unless it is called.
    """
    import mlx_lm.models
    import mlx_lm.models.cache as mlx_lm_cache

    from mlx_rgemma.griffin.cache import AttentionCache, RecurrentCache
    from mlx_rgemma.griffin.config import GriffinConfig
    from mlx_rgemma.griffin.model import Model

    if getattr(sys.modules.get(MODULE), "Model", None) is Model:
        return
    module = ModuleType(MODULE, "RecurrentGemma as mlx_rgemma computes it.")
    module.Model = Model  # type: ignore[attr-defined]
    module.ModelArgs = GriffinConfig  # type: ignore[attr-defined]
    sys.modules[MODULE] = module
    mlx_lm.models.recurrent_gemma = module  # type: ignore[attr-defined]
    # Prompt-cache files name the classes of their caches, which mlx-lm looks up in this module.
    for cache in (AttentionCache, RecurrentCache):
        setattr(mlx_lm_cache, cache.__name__, cache)
