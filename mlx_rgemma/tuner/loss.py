"""Cross entropy of the next token, without ever holding the logits of a whole batch.

Head, soft cap and cross entropy go through the tokens in chunks. While a model is trained, the
gradient of each chunk is computed along with its loss and its logits are dropped: 2,048 tokens of a
vocabulary of 256,000 would be 2.1 GB in float32, a chunk of 65 is 67 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.elementwise import soft_cap
from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.tuner.batch import Batch

CHUNK_LOGITS = 1 << 24
"""Logits of one chunk, at most: 67 MB in float32. About a dozen such arrays live at a time."""

MIN_CHUNK = 16
"""Tokens of one chunk, at least, however large the vocabulary."""


def batch_loss(
    model: Model, batch: Batch, cache: Sequence[GriffinCache] | None = None
) -> tuple[mx.array, mx.array]:
    """The loss of a batch, as a sum: divide by the count once, over all batches of an update.

    Logits are computed for the targets that count and no others. Gradients are computed along with
    the loss if the model is in training mode.

    Args:
        model: The model; trainable parameters are whatever is not frozen.
        batch: What it reads.
        cache: The state that the rows continue; updated in place. None: they begin.

    Returns:
        The sum of the cross entropies (in nats) of the targets that count, a fp32 scalar, and how
        many they are, an int32 scalar.
    """
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
) -> mx.array:
    """Sum of the cross entropies of ``soft_cap(embedding.as_linear(x))``, in chunks of tokens.

    Differentiable in `x` and in the trainable parameters of the embedding, the matrix or its
    adapters. Where those are frozen, nothing of the embedding's size is made.

    Args:
        x: (N, hidden_size), any float, behind the final norm.
        targets: (N,), int. The token to predict after each.
        embedding: Anything with `as_linear`: plain, quantized, with adapters.
        cap: Soft cap of the logits; 0 for none.
        training: Compute gradients along with the loss. Otherwise they are computed when asked for,
            with the logits a second time.
        chunk: Tokens whose logits are held at once; by default what `CHUNK_LOGITS` allows.

    Returns:
        A fp32 scalar.

    Raises:
        ValueError: If the shapes do not agree.
    """
    if x.ndim != 2 or targets.shape != x.shape[:1] or not targets.size:
        raise ValueError(
            f"[head_loss] x has shape {x.shape}, targets {targets.shape}; expected (N, D) and (N,)."
        )
    size = chunk or max(CHUNK_LOGITS // vocabulary_size(embedding), MIN_CHUNK)
    flat: Any = tree_flatten(embedding.trainable_parameters())
    names, parameters = [name for name, _ in flat], [value for _, value in flat]

    def chunk_loss(part: mx.array, wanted: mx.array, arrays: Sequence[mx.array]) -> mx.array:
        embedding.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        scores = embedding.as_linear(part)
        embedding.update(tree_unflatten(flat))
        return _cross_entropies(scores, wanted, cap).sum()

    def loss_alone(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        total = mx.array(0.0)
        for part, wanted in _chunks(x, targets, size):
            (part,) = mx.depends([part], [total])
            total = total + chunk_loss(part, wanted, arrays)
        return [total]

    def loss_and_gradients(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        total, of_x = mx.array(0.0), []
        sums = [mx.zeros(z.shape, mx.float32) for z in arrays]
        done = [total]
        for part, wanted in _chunks(x, targets, size):
            # Nothing of a chunk begins before all of the one before it is done and forgotten.
            (part,) = mx.depends([part], done)

            def of_chunk(part, *arrays, wanted=wanted):
                return [chunk_loss(part, wanted, arrays)]

            (loss,), (d_part, *d_arrays) = mx.vjp(of_chunk, [part, *arrays], [mx.array(1.0)])
            total = total + loss
            of_x.append(d_part)
            sums = [s + d.astype(mx.float32) for s, d in zip(sums, d_arrays, strict=True)]
            done = [total, d_part, *sums]
        of_arrays = [s.astype(z.dtype) for s, z in zip(sums, arrays, strict=True)]
        return [total, mx.concatenate(of_x), *of_arrays]

    run = custom_function(loss_and_gradients if training else loss_alone)

    @run.vjp
    def gradient(primals, cotangents, outputs):
        inputs = [primals] if isinstance(primals, mx.array) else primals  # one comes bare
        gradients = outputs[1:] if training else loss_and_gradients(*inputs)[1:]
        # Of the outputs, the loss alone is handed out.
        return [(g * cotangents[0]).astype(g.dtype) for g in gradients]

    loss: mx.array = run(x, *parameters)[0]
    return loss


def vocabulary_size(embedding: nn.Module) -> int:
    """Rows of an embedding's matrix, which adapters keep in a module of their own."""
    rows: int = embedding.get("embedding", embedding)["weight"].shape[0]
    return rows


def _chunks(x: mx.array, targets: mx.array, size: int) -> list[tuple[mx.array, mx.array]]:
    return [(x[i : i + size], targets[i : i + size]) for i in range(0, x.shape[0], size)]


def _cross_entropies(scores: mx.array, targets: mx.array, cap: float) -> mx.array:
    """(n, V) any float, before the soft cap; (n,) int -> (n,) fp32.

    Its gradient makes one array of the size of the logits; automatic ones make several.
    """

    def forward(scores: mx.array) -> list[mx.array]:
        logits = soft_cap(scores, mx.array(cap)) if cap else scores.astype(mx.float32)
        normalizers = mx.logsumexp(logits, axis=-1)
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return [normalizers - chosen, normalizers, logits]

    losses = custom_function(forward)

    @losses.vjp
    def gradient(primals, cotangents, outputs):
        dtype = (primals if isinstance(primals, mx.array) else primals[0]).dtype
        _, normalizers, logits = outputs
        columns = mx.arange(logits.shape[1], dtype=targets.dtype)
        factors = cotangents[0][:, None]
        arrays = (logits, normalizers[:, None], columns, targets[:, None], factors)
        # One launch on a GPU. On a Linux CPU compiling calls the system's C++ compiler.
        slopes = _compiled_slopes if mx.default_device().type == mx.gpu else _slopes
        return (slopes(*arrays, *([mx.array(cap)] if cap else [])).astype(dtype),)

    result: mx.array = losses(scores)[0]
    return result


def _slopes(
    logits: mx.array,
    normalizers: mx.array,
    columns: mx.array,
    targets: mx.array,
    factors: mx.array,
    cap: mx.array | None = None,
) -> mx.array:
    """``(softmax - one-hot) * factor``, and the slope of the soft cap, ``1 - (logits / cap)^2``."""
    slopes = (mx.exp(logits - normalizers) - (columns == targets).astype(mx.float32)) * factors
    return slopes if cap is None else slopes * (1.0 - mx.square(logits / cap))


_compiled_slopes = mx.compile(_slopes, shapeless=True)
