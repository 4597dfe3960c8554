"""Memory: what there is, and what a step of LoRA training holds."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_rgemma.checkpoints.schema import expected_tensors
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import RECURRENT, GriffinConfig
from mlx_rgemma.io.atomic import gigabytes
from mlx_rgemma.io.memory import physical_memory
from mlx_rgemma.tuner.loss import chunk_tokens

ROW = 4
"""Bytes of a channel of a token: the residual stream is float32."""

KEPT = 1.25
"""(tokens, width) arrays that a checkpointed layer keeps: its input, and small ones."""

WORKING = 100
"""(tokens, width) arrays that exist at once, at most, while one layer goes forward and backward
again; two thirds of them are of the MLP, three times as wide. Measured on a CPU, where MLX runs up
to 100 operations ahead of what it frees."""

HEAD_CHUNKS = 16
"""Arrays of one chunk of logits that exist at once, at most; measured on a CPU, too."""

OF_ADAPTERS = 4 * 4
"""Bytes of a trained number: itself, its gradient and Adam's two moments, in float32."""


def check_memory(what: str, nbytes: int) -> None:
    """Refuse what this machine cannot hold, before it is allocated.

    Args:
        what: What it is, and what would make it smaller.
        nbytes: Bytes that it takes at the least.

    Raises:
        UserError: If they are more than the machine's memory.
    """
    if nbytes > (there := physical_memory()):
        raise UserError(
            f"{what}: at least {gigabytes(nbytes)}, and this machine has {gigabytes(there)}."
        )


def pretraining_bytes(config: GriffinConfig, tokens: int, copies: int) -> int:
    """Count what training all weights takes at the least.

    Args:
        config: The model's shape.
        tokens: Of all rows of a batch.
        copies: Arrays as large as the weights, in float32: themselves, gradients, moments.
    """
    parameters = sum(tensor.size for tensor in expected_tensors(config))
    inputs = len(config.layer_types) * tokens * config.hidden_size
    return 4 * (copies * parameters + inputs) + state_bytes(config)


def state_bytes(config: GriffinConfig) -> int:
    """Count the keys and values of a sample's state."""
    attention = sum(kind != RECURRENT for kind in config.layer_types)
    return 4 * 2 * attention * config.attention_window_size * config.head_dim


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step of LoRA training with gradient checkpointing.

    Attributes:
        weights: The model.
        adapters: Adapters, their gradients, the optimizer.
        kept: What the layers keep from the forward pass.
        layer: The layer that is at work.
        head: A few chunks of logits, before the first layer goes backward.
    """

    weights: int
    adapters: int
    kept: int
    layer: int
    head: int

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.weights + self.adapters + self.kept + max(self.layer, self.head)


def lora_step(config: GriffinConfig, tokens: int, weights: int, *, rank: int = 8) -> StepMemory:
    """Count a step with adapters on all linear layers, checkpointed.

    Args:
        config: The model's shape.
        tokens: Of all rows of a batch.
        weights: Bytes of the model.
        rank: Of the adapters.
    """
    row = tokens * config.hidden_size * ROW
    chunk = min(chunk_tokens(config.vocab_size), tokens)
    return StepMemory(
        weights=weights,
        adapters=OF_ADAPTERS * rank * _inputs_and_outputs(config),
        kept=int(KEPT * len(config.layer_types) * row),
        layer=WORKING * row,
        head=HEAD_CHUNKS * chunk * config.vocab_size * 4,
    )


def _inputs_and_outputs(config: GriffinConfig) -> int:
    """Inputs and outputs of all linear layers of all layers, added up."""
    width, inner, lru = config.hidden_size, config.intermediate_size // 2, config.lru_width
    queries = config.num_attention_heads * config.head_dim
    of_mlp = 3 * (width + inner)
    of_recurrent = 3 * (width + lru)
    of_attention = 2 * (width + queries) + 2 * (width + config.head_dim)
    return sum(
        of_mlp + (of_recurrent if kind == RECURRENT else of_attention)
        for kind in config.layer_types
    )
