"""Make mlx-lm use this package's model and caches."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

from mlx_rgemma.griffin.config import MODEL_TYPE, GriffinConfig

MODULE = "mlx_lm.models.recurrent_gemma"


class ModelArgs:
    """mlx-lm's name for `GriffinConfig`; constructing one returns a `GriffinConfig`.

    `ModelArgs(**values)` accepts the keyword arguments of mlx-lm's class and of `GriffinConfig`.
    `head_dim` defaults to hidden_size / num_attention_heads, `lru_width` to hidden_size. The number
    of key/value heads is ignored, as by mlx-lm's class: there is one.

    Raises:
        ConfigError: If a value is missing or invalid; the message names it.
        TypeError: If an argument is unknown.
    """

    def __new__(cls, **values: Any) -> GriffinConfig:  # type: ignore[misc]
        known = {f.name for f in fields(GriffinConfig)} | {"_block_types"}
        for name in values:
            if name not in known:
                raise TypeError(f"ModelArgs() got an unexpected keyword argument {name!r}")
        if "eos_token_ids" in values:
            values["eos_token_id"] = values.pop("eos_token_ids")
        values = {"model_type": MODEL_TYPE, **values, "num_key_value_heads": 1}
        return GriffinConfig.from_dict(values)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> GriffinConfig:
        """Read a `config.json`: see `GriffinConfig.from_dict`."""
        return GriffinConfig.from_dict(values)


def register() -> None:
    """Make mlx-lm run RecurrentGemma with this package's class.

    Afterwards `mlx_lm.load`, `generate`, `server`, `lora`, `fuse`, the quantizers and prompt-cache
    files all use it. Calling it again has no effect. Nothing is patched until it is called.
    """
    import mlx_lm.models
    import mlx_lm.models.cache as mlx_lm_cache

    from mlx_rgemma.griffin.cache import AttentionCache, RecurrentCache
    from mlx_rgemma.griffin.model import Model

    if getattr(sys.modules.get(MODULE), "Model", None) is Model:
        return
    module = ModuleType(MODULE, "RecurrentGemma as mlx_rgemma computes it.")
    module.Model = Model  # type: ignore[attr-defined]
    module.ModelArgs = ModelArgs  # type: ignore[attr-defined]
    sys.modules[MODULE] = module
    mlx_lm.models.recurrent_gemma = module  # type: ignore[attr-defined]
    # Prompt-cache files name the classes of their caches, which mlx-lm looks up in this module.
    for cache in (AttentionCache, RecurrentCache):
        setattr(mlx_lm_cache, cache.__name__, cache)
