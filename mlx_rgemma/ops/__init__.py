"""The operations of Griffin-like models, each with its own backward pass.

Useful beyond this package: they know nothing of configurations, checkpoints or caches.
"""

from mlx_rgemma.ops.activations import gated_gelu, residual_add, soft_cap
from mlx_rgemma.ops.autograd import inference_mode
from mlx_rgemma.ops.causal_conv1d import causal_conv1d
from mlx_rgemma.ops.cross_entropy import cross_entropies
from mlx_rgemma.ops.decode_attention import decode_attention
from mlx_rgemma.ops.linear import block_diagonal, linear, quantized_linear
from mlx_rgemma.ops.prefill_attention import prefill_attention
from mlx_rgemma.ops.recurrent_decode import MAX_STEPS, RecurrentWeights, recurrent_decode
from mlx_rgemma.ops.rg_lru import TokenType, rg_lru, token_types
from mlx_rgemma.ops.ring_buffer import RingBuffer
from mlx_rgemma.ops.rms_norm import add_rms_norm, rms_norm
from mlx_rgemma.ops.rotary import apply_rotary, rotary_angles, rotary_frequencies

__all__ = [
    "MAX_STEPS",
    "RecurrentWeights",
    "RingBuffer",
    "TokenType",
    "add_rms_norm",
    "apply_rotary",
    "block_diagonal",
    "causal_conv1d",
    "cross_entropies",
    "decode_attention",
    "gated_gelu",
    "inference_mode",
    "linear",
    "prefill_attention",
    "quantized_linear",
    "recurrent_decode",
    "residual_add",
    "rg_lru",
    "rms_norm",
    "rotary_angles",
    "rotary_frequencies",
    "soft_cap",
    "token_types",
]
