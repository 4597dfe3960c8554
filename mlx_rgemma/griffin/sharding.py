"""Tensor parallelism: the shard of a model that each rank keeps.

As in Megatron-LM (arXiv:1909.08053, section 3), with MLX's own layers. Layers that read the
residual stream are column-parallel: a rank computes some attention heads, some heads of the
recurrence with its gates, convolution and state, and some channels of the MLP. Layers that write to
the stream are row-parallel: two all-reduces per layer. The single key/value head, the ring buffer,
the norms and the embedding are replicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear

from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.cache import GriffinCache, RecurrentCache
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.griffin.parameters import MODULES, Role, modules_of, shard_axis


class Shardable(Protocol):
    """The parts of a model that sharding needs."""

    args: GriffinConfig

    @property
    def layers(self) -> Any: ...


def shard_slice(length: int, rank: int, size: int) -> slice:
    """Return the slice of an axis that a rank keeps.

    Raises:
        ValueError: If the world size does not divide it.
    """
    if length % size:
        raise ValueError(f"[shard] {size} processes do not divide an axis of {length}.")
    each = length // size
    return slice(rank * each, (rank + 1) * each)


def local_shard(name: str, value: mx.array, rank: int, size: int) -> mx.array:
    """Return a rank's shard of a tensor."""
    axis = shard_axis(name)
    if axis is None:
        return value
    index: list[Any] = [slice(None)] * value.ndim
    index[axis] = shard_slice(value.shape[axis], rank, size)
    return mx.contiguous(value[tuple(index)])


def valid_world_sizes(model: Shardable) -> list[int]:
    """Return the world sizes that can share a model.

    They divide the heads and the MLP's inner width, and split no group of quantized weights.
    """
    c = model.args
    units = [c.num_attention_heads, c.intermediate_size // 2]
    for layer in model.layers:
        for block in (layer.temporal_block, layer.mlp_block):
            for name in modules_of(Role.OUT_PROJ):
                linear = block.get(name)
                if isinstance(linear, nn.QuantizedLinear):
                    units.append(linear["scales"].shape[1])
                    # Weights are packed by 32; a group may be smaller.
                    units.append(linear["scales"].shape[1] * linear.group_size // 32)
    heads = c.num_attention_heads
    return [n for n in range(1, heads + 1) if not any(unit % n for unit in units)]


def shard_model(model: Shardable, group: mx.distributed.Group) -> None:
    """Keep this rank's shard of a model.

    Its parameters may be lazy, or be loaded as shards afterwards.

    Raises:
        UserError: If the world size does not divide the model; the message lists valid ones.
    """
    size = group.size()
    possible = valid_world_sizes(model)
    if size not in possible:
        numbers = ", ".join(str(n) for n in possible if n > 1) or "none but 1"
        quantized = " as it is quantized" if model.args.quantization is not None else ""
        raise UserError(
            f"{size} processes cannot share this model of {model.args.num_attention_heads} heads"
            f" and {model.args.intermediate_size // 2} MLP channels{quantized}; numbers that can:"
            f" {numbers}."
        )
    for layer in model.layers:
        for block in (layer.temporal_block, layer.mlp_block):
            _shard_block(block, group)


def _shard_block(block: Any, group: mx.distributed.Group) -> None:
    for name, module in MODULES.items():
        if name not in block or module.shard_axis is None:
            continue
        if module.role is Role.OUT_PROJ:
            block[name] = shard_linear(block[name], "sharded-to-all", group=group)
        elif module.role is Role.IN_PROJ:
            # In place: the result is still a linear layer, which may be fused.
            shard_inplace(block[name], "all-to-sharded", group=group)
        else:
            shard_inplace(block[name], lambda path, weight: 0, group=group)
    if "q_proj" in block:
        block.num_heads //= group.size()
    if "rg_lru" in block:
        block.rg_lru.num_heads //= group.size()


def gather_state(cache: Sequence[GriffinCache], group: mx.distributed.Group) -> list[GriffinCache]:
    """Return the whole state from the shards of all ranks; all of them must call this."""
    return [
        _recurrent(layer, lambda array: _gather(array, group))
        if isinstance(layer, RecurrentCache)
        else layer
        for layer in cache
    ]


def split_state(cache: Sequence[GriffinCache], rank: int, size: int) -> list[GriffinCache]:
    """Return a rank's shard of a whole state."""

    def part(array: mx.array) -> mx.array:
        return mx.contiguous(array[..., shard_slice(array.shape[-1], rank, size)])

    if size == 1:
        return list(cache)
    return [
        _recurrent(layer, part) if isinstance(layer, RecurrentCache) else layer for layer in cache
    ]


def _recurrent(layer: RecurrentCache, change: Any) -> RecurrentCache:
    h, conv, positions = layer.state
    return RecurrentCache.from_state((change(h), change(conv), positions))


def _gather(array: mx.array, group: mx.distributed.Group) -> mx.array:
    """Concatenate the shards of all ranks along the last axis."""
    parts = mx.distributed.all_gather(array[None], group=group)
    return mx.concatenate(list(parts), axis=-1)
