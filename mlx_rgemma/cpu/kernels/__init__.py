"""Numba kernels, compiled for the processor at hand.

Each passes through its arrays once, in registers. All have the form
``kernel(first, last, *inputs, *outputs)`` and compute the work items `first` to `last`: rows,
channels or elements. Arrays are contiguous, fp32 unless said otherwise. Slice first, so that the
loop index starts at 0: otherwise Numba's negative-index check prevents vectorization.
"""

from mlx_rgemma.cpu.kernels.adam import adam
from mlx_rgemma.cpu.kernels.attention import QUERIES, sliding_window_attention
from mlx_rgemma.cpu.kernels.prompt import add_rms_norm, causal_conv1d, gated_gelu, rg_lru, rms_norm
from mlx_rgemma.cpu.kernels.step import attention_layer, lm_head, recurrent_layer
from mlx_rgemma.cpu.kernels.threads import spin_wait

__all__ = [
    "QUERIES",
    "adam",
    "add_rms_norm",
    "attention_layer",
    "causal_conv1d",
    "gated_gelu",
    "lm_head",
    "recurrent_layer",
    "rg_lru",
    "rms_norm",
    "sliding_window_attention",
    "spin_wait",
]
