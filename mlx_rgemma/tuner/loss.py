"""Cross entropy of the next token, computed without holding the logits of a whole batch.

LM head, soft cap and cross entropy run on chunks of tokens. In training, the gradient of each chunk
is computed with its loss, and its logits are dropped: those of 2,048 tokens and a vocabulary of
256,000 would take 2.1 GB in float32, those of a chunk of 65 tokens take 67 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops import inference_mode
from mlx_rgemma.ops.autograd import custom_function
from mlx_rgemma.ops.backend import Backend, active, detach
from mlx_rgemma.ops.cross_entropy import cross_entropies
from mlx_rgemma.tuner.data.packing import Batch
from mlx_rgemma.tuner.grad_checkpoint import is_checkpointed, lazy_backend

CHUNK_LOGITS, MIN_CHUNK = 1 << 24, 16
"""Maximum of logits per chunk (67 MB in float32), and minimum of tokens for any vocabulary.

Up to `memory_estimate.MAX_LOGIT_CHUNKS` arrays of that size exist at once.
"""

CPU_CHUNK_LOGITS, CPU_MIN_CHUNK = 1 << 19, 64
"""Limits on a Linux CPU: products are as fast from 64 tokens on, and caches are small."""


def batch_loss(
    model: Model, batch: Batch, cache: Sequence[GriffinCache] | None = None
) -> tuple[mx.array, mx.array]:
    """Return the summed loss of a batch and the number of its targets.

    Divide once, over all batches of an update. Logits are computed for masked-in targets only. In
    training mode, gradients are computed with the loss.

    Args:
        model: The model; all parameters that are not frozen are trained.
        batch: The batch.
        cache: State that the sequences continue, updated in place. None: they begin.

    Returns:
        The sum of the cross entropies in nats, a fp32 scalar, and the number of targets, an int32
        scalar.
    """
    with lazy_backend() if is_checkpointed(model) else nullcontext():
        hidden = model.model(batch.tokens, cache, batch.segment_pos)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets = batch.targets.reshape(-1)
    counted = np.flatnonzero(np.array(batch.mask))
    if not len(counted):
        return mx.array(0.0), mx.array(0, mx.int32)
    if len(counted) < hidden.shape[0]:
        chosen = mx.array(counted.astype(np.int32))
        hidden, targets = hidden[chosen], targets[chosen]
    loss = head_loss(
        hidden,
        targets,
        model.model.embed_tokens,
        model.args.logits_soft_cap,
        training=model.training,
        lazy=is_checkpointed(model),
    )
    return loss, mx.array(len(counted), mx.int32)


def head_loss(
    x: mx.array,
    targets: mx.array,
    embedding: nn.Module,
    cap: float,
    *,
    training: bool = True,
    chunk: int | None = None,
    lazy: bool = False,
) -> mx.array:
    """Return the summed cross entropy of ``soft_cap(embedding.as_linear(x))``, in chunks of tokens.

    Differentiable in `x` and in the trainable parameters of the embedding (its matrix or its
    adapters). If they are frozen, no array of the embedding's size is allocated.

    Args:
        x: (N, hidden_size), any float. Output of the final norm.
        targets: (N,), int. The next token of each.
        embedding: A module with `as_linear`: plain, quantized or with adapters.
        cap: Soft cap of the logits; 0 for none.
        training: Compute gradients with the loss. Otherwise a gradient recomputes the logits.
        chunk: Tokens per chunk. Default: `chunk_tokens`.
        lazy: Evaluate nothing before the loss is: for checkpointed layers.

    Returns:
        A fp32 scalar.

    Raises:
        ValueError: If the shapes do not match.
    """
    if x.ndim != 2 or targets.shape != x.shape[:1] or not targets.size:
        raise ValueError(
            f"[head_loss] x has shape {x.shape}, targets {targets.shape}; expected (N, D) and (N,)."
        )
    size = chunk or chunk_tokens(vocabulary_size(embedding))
    flat: Any = tree_flatten(embedding.trainable_parameters())
    names, parameters = [name for name, _ in flat], [value for _, value in flat]

    def chunk_loss(part: mx.array, wanted: mx.array, arrays: Sequence[mx.array]) -> mx.array:
        embedding.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        scores = embedding.as_linear(part)
        embedding.update(tree_unflatten(flat))
        return cross_entropies(scores, wanted, cap).sum()

    def loss_alone(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        total = mx.array(0.0)
        for part, wanted in _chunks(x, targets, size):
            (part,) = mx.depends([part], [total])
            with inference_mode():  # keeps no arrays for a gradient
                total = total + chunk_loss(part, wanted, arrays)
        return [total]

    def loss_and_gradients(x: mx.array, *given: mx.array) -> list[mx.array]:
        total, of_x = mx.array(0.0), []
        x, *arrays = detach(x, *given)
        sums = [mx.zeros(z.shape, mx.float32) for z in arrays]
        done = [total]
        for part, wanted in _chunks(x, targets, size):
            # A chunk begins when the one before is complete and its logits are freed.
            (part,) = mx.depends([part], done)

            def of_chunk(part, *arrays, wanted=wanted):
                return [chunk_loss(part, wanted, arrays)]

            (loss,), gradients = mx.vjp(of_chunk, [part, *arrays], [mx.array(1.0)])
            loss, d_part, *d_arrays = detach(loss, *gradients)
            total = total + loss
            of_x.append(d_part)
            sums = [s + d.astype(mx.float32) for s, d in zip(sums, d_arrays, strict=True)]
            done = [total, d_part, *sums]
        of_arrays = [s.astype(z.dtype) for s, z in zip(sums, arrays, strict=True)]
        return [total, mx.concatenate(of_x), *of_arrays]

    @custom_function
    def run(*inputs: mx.array) -> list[mx.array]:
        # To evaluate here would evaluate the layers, and undo their checkpointing.
        with lazy_backend() if lazy else nullcontext():
            return (loss_and_gradients if training else loss_alone)(*inputs)

    @run.vjp
    def gradient(primals, cotangents, outputs):
        inputs = [primals] if isinstance(primals, mx.array) else primals  # a single one is bare
        if training:
            gradients = outputs[1:]
        else:  # after the forward pass: both hold chunks of logits
            x, *arrays = inputs
            with lazy_backend():
                gradients = loss_and_gradients(*mx.depends([x], outputs), *arrays)[1:]
        # Only the first output, the loss, is used.
        return [(g * cotangents[0]).astype(g.dtype) for g in gradients]

    loss: mx.array = run(x, *parameters)[0]
    return loss


def chunk_tokens(vocabulary: int) -> int:
    """Return the number of tokens per chunk of logits."""
    tokens = max(CHUNK_LOGITS // vocabulary, MIN_CHUNK)
    if active() is not Backend.CPU:
        return tokens
    return min(tokens, max(CPU_CHUNK_LOGITS // vocabulary, CPU_MIN_CHUNK))


def vocabulary_size(embedding: nn.Module) -> int:
    """Return the vocabulary size of an embedding, also with adapters, which nest its matrix."""
    size: int = embedding.get("embedding", embedding)["weight"].shape[0]
    return size


def _chunks(x: mx.array, targets: mx.array, size: int) -> list[tuple[mx.array, mx.array]]:
    return [(x[i : i + size], targets[i : i + size]) for i in range(0, x.shape[0], size)]
