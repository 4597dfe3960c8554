"""LoRA (arXiv:2106.09685) for the RG-LRU's two block-diagonal gates."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.griffin.layers import RGLRU
from mlx_rgemma.griffin.sequence_info import SequenceInfo

GATES = ("input_gate", "recurrent_gate")


class LoRAGates(nn.Module):
    """An RG-LRU with gate weights ``weight + scale * lora_a @ lora_b`` per head.

    The matrices of a gate are small, (heads, D / heads, D / heads), so their sum with the adapters
    is computed in each call. The RG-LRU's own parameters are frozen.

    Args:
        rg_lru: The RG-LRU.
        rank: Rank of the adapters.
        scale: Factor of the adapters.
    """

    def __init__(self, rg_lru: RGLRU, rank: int, scale: float) -> None:
        super().__init__()
        self.rg_lru = rg_lru
        rg_lru.freeze()
        self.scale = scale
        for gate in GATES:
            heads, inputs, outputs = rg_lru[f"{gate}_weight"].shape
            bound = 1.0 / math.sqrt(inputs)
            self[f"{gate}_lora_a"] = mx.random.uniform(-bound, bound, (heads, inputs, rank))
            self[f"{gate}_lora_b"] = mx.zeros((heads, rank, outputs))

    def __call__(
        self, x: mx.array, info: SequenceInfo, h0: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        return RGLRU.__call__(self, x, info, h0)  # type: ignore[arg-type]

    @property
    def recurrent_param(self) -> mx.array:
        return self.rg_lru.recurrent_param

    @property
    def input_gate_bias(self) -> mx.array:
        return self.rg_lru.input_gate_bias

    @property
    def recurrent_gate_bias(self) -> mx.array:
        return self.rg_lru.recurrent_gate_bias

    @property
    def input_gate_weight(self) -> mx.array:
        return self._adapted("input_gate")

    @property
    def recurrent_gate_weight(self) -> mx.array:
        return self._adapted("recurrent_gate")

    def _adapted(self, gate: str) -> mx.array:
        weight: mx.array = self.rg_lru[f"{gate}_weight"]
        delta = self.scale * self[f"{gate}_lora_a"] @ self[f"{gate}_lora_b"]
        return weight + delta.astype(weight.dtype)

    def fuse(self, dequantize: bool = False) -> RGLRU:
        """Return the RG-LRU with the adapters fused into its weights.

        Args:
            dequantize: Unused; mlx-lm's `fuse` passes it to every adapter.
        """
        for gate in GATES:
            self.rg_lru[f"{gate}_weight"] = self._adapted(gate)
        return self.rg_lru


def add_gate_adapters(model: Any, num_layers: int, rank: int, scale: float) -> None:
    """Add adapters to the gates of a model's last recurrent blocks.

    Args:
        model: A `Model`.
        num_layers: Number of layers, from the last; -1 for all.
        rank, scale: See `LoRAGates`.
    """
    for layer in model.layers[-max(num_layers, 0) :]:
        block = layer.temporal_block
        if "rg_lru" in block:
            block.rg_lru = LoRAGates(block.rg_lru, rank, scale)
