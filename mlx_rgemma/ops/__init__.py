"""The operations of Griffin-like models, each with its own backward pass.

Useful beyond this package: they know nothing of configurations, checkpoints or caches.
"""

from mlx_rgemma.ops.attention import (
    Ring,
    local_attention,
    ring_attention,
    ring_step,
    windowed_attention,
)
from mlx_rgemma.ops.conv import causal_conv1d
from mlx_rgemma.ops.norm import add_rms_norm, rms_norm
from mlx_rgemma.ops.rg_lru import rg_lru, step_kinds
from mlx_rgemma.ops.rotary import apply_rotary, rotary_angles, rotary_frequencies
from mlx_rgemma.ops.scan import linear_scan
from mlx_rgemma.ops.step import RecurrentWeights, recurrent_step

__all__ = [
    "RecurrentWeights",
    "Ring",
    "add_rms_norm",
    "apply_rotary",
    "causal_conv1d",
    "linear_scan",
    "local_attention",
    "recurrent_step",
    "rg_lru",
    "ring_attention",
    "ring_step",
    "rms_norm",
    "rotary_angles",
    "rotary_frequencies",
    "step_kinds",
    "windowed_attention",
]
