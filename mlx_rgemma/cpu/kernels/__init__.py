"""The loops of `loops`, in Python that Numba compiles for the processor at hand.

Each goes through its arrays once, in registers. All have the form
``loop(first, last, *inputs, *outputs)`` and do the units `first` to `last` of their work, of which
threads get a share each: rows, channels or elements. Arrays are contiguous, fp32 unless said
otherwise. A share is cut out first: an index that counts from 0 needs no look at its sign, which
would keep the compiler from working on several numbers at a time.
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
