"""The operations of Griffin-like models, each with its own backward pass.

Useful beyond this package: they know nothing of configurations, checkpoints or caches.
"""

from mlx_rgemma.ops.attention import Ring, ring_attention, windowed_attention
from mlx_rgemma.ops.conv import causal_conv1d
from mlx_rgemma.ops.rg_lru import rg_lru
from mlx_rgemma.ops.rotary import apply_rotary, rotary_angles, rotary_frequencies
from mlx_rgemma.ops.scan import linear_scan

__all__ = [
    "Ring",
    "apply_rotary",
    "causal_conv1d",
    "linear_scan",
    "rg_lru",
    "ring_attention",
    "rotary_angles",
    "rotary_frequencies",
    "windowed_attention",
]
