"""Timed generation and training steps of a loaded model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_rgemma.errors import UserError
from mlx_rgemma.ops.streams import synchronize_streams
from mlx_rgemma.tuner.data.packing import Batch
from mlx_rgemma.tuner.loss import batch_loss

UNQUANTIZED = "none"

LEARNING_RATE = 1e-5

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
"""mlx-lm's defaults."""


@dataclass(frozen=True)
class Generated:
    """Times of one generation.

    Attributes:
        first_token_s: Seconds until the first token of every prompt.
        last_token_s: Seconds until the last token.
        tokens: Tokens per prompt.
        state_bytes: Bytes of the state at the end, of all prompts together.
    """

    first_token_s: float
    last_token_s: float
    tokens: int
    state_bytes: int


def stream_tokens(
    model: Any, prompt: mx.array, cache: list[Any], tokens: int, step_size: int
) -> Iterator[int]:
    """Yield the tokens of this package's own decode loop, greedily, with no end of text."""
    from mlx_rgemma.generation.api import stream_generate

    responses = stream_generate(
        model, _NoTokenizer(), prompt, tokens, prompt_cache=cache, prefill_step_size=step_size
    )
    for response in responses:
        yield response.token


def time_tokens(tokens: Iterator[int], begin: float, cache: list[Any]) -> Generated:
    """Time a decode loop that began at a moment of `time.perf_counter`."""
    first = last = 0.0
    count = 0
    for _ in tokens:
        count += 1
        last = time.perf_counter() - begin
        first = first or last
    synchronize_streams()  # a loop has started one more token
    return Generated(first, last, count, sum(layer.nbytes for layer in cache))


def time_batch(model: Any, prompts: list[list[int]], tokens: int, step_size: int) -> Generated:
    """Time mlx-lm's `BatchGenerator` on prompts of one length."""
    from mlx_lm.generate import BatchGenerator

    first = last = 0.0
    count = state = 0
    begin = time.perf_counter()
    generator = BatchGenerator(
        model,
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
        prefill_step_size=step_size,
    )
    try:
        generator.insert(prompts, [tokens] * len(prompts))
        while responses := generator.next_generated():
            last = time.perf_counter() - begin
            first = first or last
            count += len(responses)
            for response in responses:
                if response.finish_reason is not None:
                    state += sum(layer.nbytes for layer in response.prompt_cache)
    finally:
        generator.close()
    synchronize_streams()  # a loop has started one more token
    return Generated(first, last, count // len(prompts), state)


def mean_loss(model: Any, sequences: mx.array) -> mx.array:
    """Return the mean cross entropy per token, as this package's trainer computes it.

    Args:
        model: This package's.
        sequences: (B, L + 1) token ids, of which L are read.
    """
    tokens, targets = sequences[:, :-1], sequences[:, 1:]
    total, counted = batch_loss(model, Batch(tokens, targets, mx.ones(tokens.shape, mx.bool_)))
    return total / counted


class TrainingStep:
    """A model with an optimizer, for timing one step after another.

    Args:
        model: Its weights, or the adapters that it gets, are updated.
        loss: Function of the model and (B, L + 1) token ids.
        optimizer: One of MLX's.
        kind: "full" or "lora".
        compiled: Whether to compile the step.

    Raises:
        UserError: If quantized weights were to be trained.
    """

    def __init__(
        self, model: Any, loss: Any, optimizer: optim.Optimizer, kind: str, *, compiled: bool
    ) -> None:
        if kind == "lora":
            from mlx_lm.tuner.utils import linear_to_lora_layers

            model.freeze()
            linear_to_lora_layers(model, len(model.layers), LORA)
        elif quantization_label(model) != UNQUANTIZED:
            raise UserError("trains quantized weights with LoRA only")
        model.train()
        optimizer.init(model.trainable_parameters())  # a compiled step keeps its shapes
        gradients = nn.value_and_grad(model, lambda sequences: loss(model, sequences))

        def step(sequences: mx.array) -> mx.array:
            value, gradient = gradients(sequences)
            optimizer.update(model, gradient)
            return value

        self.arrays = [model.state, optimizer.state]
        self.run: Any = mx.compile(step, self.arrays, self.arrays) if compiled else step

    def seconds(self, sequences: mx.array) -> float:
        """Return the seconds of one step on (B, L + 1) token ids."""
        mx.eval(sequences)
        begin = time.perf_counter()
        loss = self.run(sequences)
        mx.eval(loss, self.arrays)
        return time.perf_counter() - begin


def dequantized_bytes(model: Any) -> int:
    """Return the bytes that a decode step reads beyond the weights.

    On a Linux CPU quantized matrices are cached in float32, and read from there.
    """
    cached: int = model.dequantized_nbytes
    packed = sum(
        layer[key].nbytes
        for _, layer in model.named_modules()
        if "scales" in layer
        for key in ("weight", "scales", "biases")
        if key in layer
    )
    return cached - packed if cached else 0


def quantization_label(model: Any) -> str:
    """Return the bits of a model's quantized matrices, their mode if it is not affine, or none."""
    layers: list[Any] = [m for _, m in model.named_modules() if "scales" in m]
    if not layers:
        return UNQUANTIZED
    modes = {layer.mode for layer in layers}
    if modes != {"affine"}:
        return ", ".join(sorted(modes))
    bits = sorted({layer.bits for layer in layers})
    return str(bits[0]) if len(bits) == 1 else f"{bits[0]}-{bits[-1]}"


class _NoTokenizer:
    """A tokenizer that makes no text and has no end of text."""

    eos_token_ids = ()
    last_segment = text = ""
    tokens: tuple[int, ...] = ()

    @property
    def detokenizer(self) -> _NoTokenizer:
        return self

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass
