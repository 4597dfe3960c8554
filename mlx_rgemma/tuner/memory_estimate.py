"""Estimates of the memory that training needs."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_rgemma.checkpoints.schema import expected_tensors
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import RECURRENT, GriffinConfig
from mlx_rgemma.griffin.parameters import Role, find_module
from mlx_rgemma.io.atomic import gigabytes
from mlx_rgemma.io.memory import physical_memory
from mlx_rgemma.tuner.loss import chunk_tokens

STREAM_BYTES = 4
"""Bytes per channel and token: the residual stream is float32."""

ARRAYS_PER_LAYER = 1.25
"""(tokens, width) arrays that a checkpointed layer keeps: its input, and small ones."""

MAX_WORKING_ARRAYS = 104
"""(tokens, width) arrays that exist at once while a layer is recomputed and differentiated; two
thirds of them belong to the MLP, which is three times as wide. Measured on a CPU, where MLX runs up
to 100 operations ahead of what it frees."""

MAX_LOGIT_CHUNKS = 18
"""Chunks of logits that exist at once; measured on a CPU."""

BYTES_PER_TRAINED = 4 * 4
"""Bytes per trained element: weight, gradient and Adam's two moments, in float32."""


def check_memory(what: str, nbytes: int) -> None:
    """Refuse settings that this machine cannot hold, before anything is allocated.

    Args:
        what: Beginning of the message: what is too large.
        nbytes: Lower bound of the bytes that are needed.

    Raises:
        UserError: If they exceed the machine's memory.
    """
    if nbytes > (available := physical_memory()):
        raise UserError(
            f"{what}: at least {gigabytes(nbytes)}, and this machine has {gigabytes(available)}."
        )


def pretraining_bytes(config: GriffinConfig, tokens: int, copies: int) -> int:
    """Return a lower bound of the bytes for training all weights.

    Args:
        config: Shape of the model.
        tokens: Tokens per batch.
        copies: Number of float32 arrays per parameter: weight, gradient, moments.
    """
    parameters = sum(tensor.size for tensor in expected_tensors(config))
    inputs = len(config.layer_types) * tokens * config.hidden_size
    return 4 * (copies * parameters + inputs) + state_bytes(config)


def state_bytes(config: GriffinConfig) -> int:
    """Return the bytes of one sequence's keys and values."""
    attention = sum(kind != RECURRENT for kind in config.layer_types)
    return 4 * 2 * attention * config.attention_window_size * config.head_dim


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step of LoRA training with gradient checkpointing.

    Attributes:
        weights: Weights of the model.
        adapters: Adapters, their gradients and the optimizer.
        kept: Arrays that the layers keep for the backward pass.
        layer: Working arrays of one layer.
        head: Chunks of logits, before the backward pass of the layers.
    """

    weights: int
    adapters: int
    kept: int
    layer: int
    head: int

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return self.weights + self.adapters + self.kept + max(self.layer, self.head)


def lora_step(config: GriffinConfig, tokens: int, weights: int, *, rank: int = 8) -> StepMemory:
    """Estimate a step with adapters on all linear layers and gradient checkpointing.

    Args:
        config: Shape of the model.
        tokens: Tokens per batch.
        weights: Bytes of the model.
        rank: Rank of the adapters.
    """
    stream = tokens * config.hidden_size * STREAM_BYTES
    chunk = min(chunk_tokens(config.vocab_size), tokens)
    projections = (
        tensor.shape
        for tensor in expected_tensors(config)
        if tensor.matrix and find_module(tensor.name).role is not Role.EMBEDDING
    )
    return StepMemory(
        weights=weights,
        adapters=BYTES_PER_TRAINED * rank * sum(rows + columns for rows, columns in projections),
        kept=int(ARRAYS_PER_LAYER * len(config.layer_types) * stream),
        layer=MAX_WORKING_ARRAYS * stream,
        head=MAX_LOGIT_CHUNKS * chunk * config.vocab_size * 4,
    )
