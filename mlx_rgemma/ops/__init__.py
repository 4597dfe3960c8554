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
from mlx_rgemma.ops.elementwise import add_to_stream, gated_gelu, soft_cap
from mlx_rgemma.ops.fused import forward_only
from mlx_rgemma.ops.gates import block_diagonal
from mlx_rgemma.ops.linear import linear, quantized_linear
from mlx_rgemma.ops.norm import add_rms_norm, rms_norm
from mlx_rgemma.ops.processor import on_linux_cpu
from mlx_rgemma.ops.rg_lru import rg_lru, step_kinds
from mlx_rgemma.ops.rotary import apply_rotary, rotary_angles, rotary_frequencies
from mlx_rgemma.ops.scan import linear_scan
from mlx_rgemma.ops.step import MAX_STEPS, RecurrentWeights, recurrent_step

__all__ = [
    "MAX_STEPS",
    "RecurrentWeights",
    "Ring",
    "add_rms_norm",
    "add_to_stream",
    "apply_rotary",
    "block_diagonal",
    "causal_conv1d",
    "forward_only",
    "gated_gelu",
    "linear",
    "linear_scan",
    "local_attention",
    "on_linux_cpu",
    "quantized_linear",
    "recurrent_step",
    "rg_lru",
    "ring_attention",
    "ring_step",
    "rms_norm",
    "rotary_angles",
    "rotary_frequencies",
    "soft_cap",
    "step_kinds",
    "windowed_attention",
]
