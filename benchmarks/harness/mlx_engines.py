"""This package's model, and mlx-lm's own, as engines to compare."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from benchmarks.harness.engines import Loaded, Unsupported
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation.random_model import SHAPES, quantize, random_model
from mlx_rgemma.evaluation.timing import (
    LEARNING_RATE,
    UNQUANTIZED,
    Generated,
    TrainingStep,
    dequantized_bytes,
    mean_loss,
    quantization_label,
    stream_tokens,
    time_batch,
    time_tokens,
)
from mlx_rgemma.ops import backend


class _MlxEngine(ABC):
    """The common part: batches, generation after a long text, and training steps."""

    model: Any

    def __init__(self) -> None:
        self.states: dict[int, list[Any]] = {}
        self.training: TrainingStep | None = None

    def load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Loaded:
        import mlx_lm.generate  # noqa: F401  (the import takes seconds: not to be timed)

        self.model = self._load(model, dtype, quantization)
        self.model.eval()
        weights: Any = tree_flatten(self.model.parameters())
        weight_bytes = sum(value.nbytes for _, value in weights)
        return Loaded(
            dtype=str(self.model.model.final_norm.weight.dtype).removeprefix("mlx.core."),
            quantization=quantization_label(self.model),
            weight_bytes=weight_bytes,
            read_bytes=weight_bytes + self._more_to_read(),
            vocab_size=self.model.args.vocab_size,
        )

    def generate(self, prompts: list[list[int]], tokens: int, step_size: int) -> Generated:
        if len(prompts) > 1:
            return time_batch(self.model, prompts, tokens, step_size)
        cache = self.model.make_cache()
        return self._timed(mx.array(prompts[0]), cache, tokens, step_size)

    def generate_after(self, context: int, tokens: int, step_size: int) -> Generated:
        last = mx.array([self.model.args.vocab_size - 1])
        if context not in self.states:
            cache = self.states[context] = self.model.make_cache()
            text = mx.random.randint(
                0, self.model.args.vocab_size, (context,), key=mx.random.key(0)
            )
            self._timed(text, cache, 1, step_size)
        # The next trial begins at the same position.
        return self._timed(last, deepcopy(self.states[context]), tokens, step_size)

    def train(self, sequences: list[list[int]], kind: str) -> float:
        if self.training is None:
            try:
                self.training = TrainingStep(
                    self.model, self._loss, self._optimizer(), kind, compiled=self._compiled()
                )
            except UserError as error:
                raise Unsupported(str(error)) from error
        return self.training.seconds(mx.array(sequences))

    def peak_memory(self) -> int | None:
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return peak

    def _timed(self, prompt: mx.array, cache: list[Any], tokens: int, step_size: int) -> Generated:
        mx.eval(prompt)
        begin = time.perf_counter()
        return time_tokens(self._tokens(prompt, cache, tokens, step_size), begin, cache)

    @abstractmethod
    def _load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Any:
        """Return the model, evaluated."""

    def _more_to_read(self) -> int:
        """Return the bytes that a decode step reads beyond the weights."""
        return 0

    @abstractmethod
    def _tokens(
        self, prompt: mx.array, cache: list[Any], tokens: int, step_size: int
    ) -> Iterator[int]:
        """Yield the tokens of the library's own loop, greedily."""

    @abstractmethod
    def _loss(self, model: Any, sequences: mx.array) -> mx.array:
        """Return the mean cross entropy of (B, L + 1) token ids."""

    def _optimizer(self) -> optim.Optimizer:
        """Return the library's optimizer."""
        return optim.AdamW(LEARNING_RATE)

    @abstractmethod
    def _compiled(self) -> bool:
        """Return whether the library compiles its training step."""


class MlxRGemma(_MlxEngine):
    """This package: its model, its decode loop, its loss."""

    def _load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Any:
        from mlx_rgemma.checkpoints.load import load_model

        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        if "shape" in model:
            chosen = dtype or ("float32" if on_cpu else "bfloat16")
            return random_model(SHAPES[model["shape"]], getattr(mx, chosen), quantization)
        loaded, config = load_model(model["folder"], dtype=dtype, lazy=True)
        if config.quantization is not None and quantization != UNQUANTIZED:
            raise UserError(f"--quantize {quantization}: the model is quantized already.")
        quantize(loaded, quantization)
        loaded.prepare_for_inference()
        return loaded

    def _more_to_read(self) -> int:
        return dequantized_bytes(self.model)

    def _tokens(
        self, prompt: mx.array, cache: list[Any], tokens: int, step_size: int
    ) -> Iterator[int]:
        return stream_tokens(self.model, prompt, cache, tokens, step_size)

    def _loss(self, model: Any, sequences: mx.array) -> mx.array:
        return mean_loss(model, sequences)

    def _optimizer(self) -> optim.Optimizer:
        optimizer: optim.Optimizer = backend.optimizer(super()._optimizer())
        return optimizer

    def _compiled(self) -> bool:
        return False


class MlxLm(_MlxEngine):
    """mlx-lm's own class, through mlx-lm's loop and its trainer's loss."""

    def _load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Any:
        from mlx_lm.utils import load_model

        loaded, _ = load_model(Path(model["folder"]), lazy=True)
        if "_no_grad" not in vars(loaded):
            # Its constructor does not call nn.Module's, which training needs.
            nn.Module.__init__(loaded)
        if dtype is not None:
            loaded.set_dtype(getattr(mx, dtype))
        quantize(loaded, quantization)
        mx.eval(loaded.parameters())
        return loaded

    def _tokens(
        self, prompt: mx.array, cache: list[Any], tokens: int, step_size: int
    ) -> Iterator[int]:
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        steps: Any = generate_step(
            prompt, self.model, max_tokens=tokens, prompt_cache=cache, prefill_step_size=step_size
        )
        streams: Any = [generation_stream]
        with wired_limit(self.model, streams), closing(steps):
            for token, _ in steps:
                yield token

    def _loss(self, model: Any, sequences: mx.array) -> mx.array:
        logits = model(sequences[:, :-1])
        return nn.losses.cross_entropy(logits, sequences[:, 1:]).astype(mx.float32).mean()

    def _compiled(self) -> bool:
        # As its trainer does; on a Linux CPU the system's compiler would take minutes.
        return mx.default_device() != mx.Device(mx.cpu)
