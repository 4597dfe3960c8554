"""This package's model, and mlx-lm's own, as the benchmark measures them."""

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

from mlx_rgemma.errors import UserError
from mlx_rgemma.measurement.engines import LEARNING_RATE, Generated, Loaded, Unsupported
from mlx_rgemma.measurement.shapes import SHAPES, UNQUANTIZED, quantize, random_model
from mlx_rgemma.ops.streams import synchronize_streams

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
"""mlx-lm's defaults."""


class _MlxEngine(ABC):
    """What the two share: batches, reading far, and training steps."""

    model: Any

    def __init__(self) -> None:
        self.states: dict[int, list[Any]] = {}
        self.training: _Training | None = None

    def load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Loaded:
        import mlx_lm.generate  # noqa: F401  (it takes seconds, which nobody is to time)

        self.model = self._load(model, dtype, quantization)
        self.model.eval()
        weights: Any = tree_flatten(self.model.parameters())
        weight_bytes = sum(value.nbytes for _, value in weights)
        return Loaded(
            dtype=str(self.model.model.final_norm.weight.dtype).removeprefix("mlx.core."),
            quantization=_bits(self.model),
            weight_bytes=weight_bytes,
            read_bytes=weight_bytes + self._more_to_read(),
            vocab_size=self.model.args.vocab_size,
        )

    def generate(self, prompts: list[list[int]], tokens: int, step_size: int) -> Generated:
        if len(prompts) > 1:
            return self._generate_batch(prompts, tokens, step_size)
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
        # The next trial begins at the same place.
        return self._timed(last, deepcopy(self.states[context]), tokens, step_size)

    def train(self, rows: list[list[int]], kind: str) -> float:
        if self.training is None:
            self.training = _Training(
                self.model, self._loss, self._optimizer(), kind, compiled=self._compiled()
            )
        return self.training.step(mx.array(rows))

    def peak_memory(self) -> int | None:
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return peak

    def _timed(self, prompt: mx.array, cache: list[Any], tokens: int, step_size: int) -> Generated:
        mx.eval(prompt)
        first = last = 0.0
        count = 0
        begin = time.perf_counter()
        for _ in self._tokens(prompt, cache, tokens, step_size):
            count += 1
            last = time.perf_counter() - begin
            first = first or last
        synchronize_streams()  # of the token, too, that a loop has begun and nobody asks for
        return Generated(first, last, count, sum(layer.nbytes for layer in cache))

    def _generate_batch(self, prompts: list[list[int]], tokens: int, step_size: int) -> Generated:
        from mlx_lm.generate import BatchGenerator

        first = last = 0.0
        count = state = 0
        begin = time.perf_counter()
        generator = BatchGenerator(
            self.model,
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
        synchronize_streams()  # of the token, too, that a loop has begun and nobody asks for
        return Generated(first, last, count // len(prompts), state)

    @abstractmethod
    def _load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Any:
        """The model, computed."""

    def _more_to_read(self) -> int:
        """Bytes that a decode step reads beyond the weights."""
        return 0

    @abstractmethod
    def _tokens(
        self, prompt: mx.array, cache: list[Any], tokens: int, step_size: int
    ) -> Iterator[int]:
        """Tokens of the library's own loop, greedily."""

    @abstractmethod
    def _loss(self, model: Any, rows: mx.array) -> mx.array:
        """Mean cross entropy of rows of one token more than are read."""

    def _optimizer(self) -> optim.Optimizer:
        """What the library trains with."""
        return optim.AdamW(LEARNING_RATE)

    @abstractmethod
    def _compiled(self) -> bool:
        """Whether the library compiles its training step."""


class Ours(_MlxEngine):
    """This package: its model, its loop, its loss."""

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
        expanded: int = self.model.dequantized_nbytes
        packed = sum(
            layer[key].nbytes
            for _, layer in self.model.named_modules()
            if "scales" in layer
            for key in ("weight", "scales", "biases")
            if key in layer
        )
        return expanded - packed if expanded else 0

    def _tokens(
        self, prompt: mx.array, cache: list[Any], tokens: int, step_size: int
    ) -> Iterator[int]:
        from mlx_rgemma.generation.api import stream_generate

        answers = stream_generate(
            self.model,
            _NoTokenizer(),
            prompt,
            tokens,
            prompt_cache=cache,
            prefill_step_size=step_size,
        )
        for answer in answers:
            yield answer.token

    def _loss(self, model: Any, rows: mx.array) -> mx.array:
        from mlx_rgemma.tuner.data.batch import Batch
        from mlx_rgemma.tuner.loss import batch_loss

        tokens, targets = rows[:, :-1], rows[:, 1:]
        batch = Batch(tokens, targets, mx.ones(tokens.shape, mx.bool_))
        total, counted = batch_loss(model, batch)
        return total / counted

    def _optimizer(self) -> optim.Optimizer:
        from mlx_rgemma.ops import backend

        return backend.optimizer(super()._optimizer())

    def _compiled(self) -> bool:
        return False


class MlxLm(_MlxEngine):
    """mlx-lm's own class, through mlx-lm's loop and trainer's loss."""

    def _load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Any:
        from mlx_lm.utils import load_model

        loaded, _ = load_model(Path(model["folder"]), lazy=True)
        if "_no_grad" not in vars(loaded):
            # Its constructor leaves out nn.Module's, without which there is no training.
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

    def _loss(self, model: Any, rows: mx.array) -> mx.array:
        logits = model(rows[:, :-1])
        return nn.losses.cross_entropy(logits, rows[:, 1:]).astype(mx.float32).mean()

    def _compiled(self) -> bool:
        # As its trainer does; on a Linux CPU the system's compiler would take minutes.
        return mx.default_device() != mx.Device(mx.cpu)


class _Training:
    """A model with an optimizer, ready for one step after another."""

    def __init__(
        self, model: Any, loss: Any, optimizer: optim.Optimizer, kind: str, *, compiled: bool
    ) -> None:
        if kind == "lora":
            from mlx_lm.tuner.utils import linear_to_lora_layers

            model.freeze()
            linear_to_lora_layers(model, len(model.layers), LORA)
        elif _bits(model) != UNQUANTIZED:
            raise Unsupported("trains quantized weights with LoRA only")
        model.train()
        optimizer.init(model.trainable_parameters())  # a compiled step keeps its shapes
        gradients = nn.value_and_grad(model, lambda rows: loss(model, rows))

        def step(rows: mx.array) -> mx.array:
            value, gradient = gradients(rows)
            optimizer.update(model, gradient)
            return value

        self.arrays = [model.state, optimizer.state]
        self.run: Any = mx.compile(step, self.arrays, self.arrays) if compiled else step

    def step(self, rows: mx.array) -> float:
        mx.eval(rows)
        begin = time.perf_counter()
        loss = self.run(rows)
        mx.eval(loss, self.arrays)
        return time.perf_counter() - begin


class _NoTokenizer:
    """In a tokenizer's place: token ids are not turned into text, and none ends it."""

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


def _bits(model: Any) -> str:
    """Bits of a model's quantized matrices, or their mode where it is not MLX's affine one."""
    layers: list[Any] = [m for _, m in model.named_modules() if "scales" in m]
    if not layers:
        return UNQUANTIZED
    modes = {layer.mode for layer in layers}
    if modes != {"affine"}:
        return ", ".join(sorted(modes))
    bits = sorted({layer.bits for layer in layers})
    return str(bits[0]) if len(bits) == 1 else f"{bits[0]}-{bits[-1]}"
