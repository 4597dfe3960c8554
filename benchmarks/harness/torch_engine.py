"""transformers' RecurrentGemma on PyTorch, as an engine to compare with."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.harness.engines import Loaded, Unsupported
from mlx_rgemma.evaluation.timing import LEARNING_RATE, UNQUANTIZED, Generated


class Transformers:
    """transformers' class, through its `generate`."""

    model: Any
    optimizer: Any = None

    def load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Loaded:
        if quantization != UNQUANTIZED:
            raise Unsupported("has no MLX quantization")
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model["folder"], dtype="auto" if dtype is None else getattr(torch, dtype)
        )
        self.model = loaded.to(_device(model.get("device", "cpu"))).eval()
        settings = self.model.generation_config
        settings.eos_token_id, settings.pad_token_id = None, 0
        weights = {p.data_ptr(): p.nbytes for p in self.model.parameters()}  # the head is tied
        return Loaded(
            dtype=str(self.model.dtype).removeprefix("torch."),
            quantization=UNQUANTIZED,
            weight_bytes=sum(weights.values()),
            read_bytes=sum(weights.values()),
            vocab_size=self.model.config.vocab_size,
        )

    def generate(self, prompts: list[list[int]], tokens: int, step_size: int) -> Generated:
        ids = torch.tensor(prompts, device=self.model.device)
        clock = _Clock()
        with torch.inference_mode():
            answer = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=clock,
                return_dict_in_generate=True,
            )
        count = answer.sequences.shape[1] - ids.shape[1]
        return Generated(clock.times[0], clock.times[-1], count, self._state_bytes(answer))

    def generate_after(self, context: int, tokens: int, step_size: int) -> Generated:
        raise Unsupported("reads a prompt in one piece, too large for memory")

    def train(self, sequences: list[list[int]], kind: str) -> float:
        if kind != "full":
            raise Unsupported("trains with LoRA through a library of its own")
        if self.optimizer is None:
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        ids = torch.tensor(sequences, device=self.model.device)
        begin = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        loss.item()  # waits for the device
        return time.perf_counter() - begin

    def peak_memory(self) -> int | None:
        return None

    def _state_bytes(self, answer: Any) -> int:
        """Return the bytes kept between tokens: keys and values in a cache, the rest in layers."""
        cache = getattr(answer, "past_key_values", None)
        kept = [
            array
            for layer in getattr(cache, "layers", [])
            for array in (getattr(layer, "keys", None), getattr(layer, "values", None))
        ]
        for module in self.model.modules():
            kept += [getattr(module, name, None) for name in ("recurrent_states", "conv1d_state")]
        return sum(array.nbytes for array in kept if array is not None)


class _Clock(BaseStreamer):
    """Records the time of each token; `put` gets the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.begin = time.perf_counter()
        self.prompt_seen = False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            self.times.append(time.perf_counter() - self.begin)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def _device(kind: str) -> str:
    """Return PyTorch's name of the device that MLX runs on."""
    if kind == "cpu":
        return "cpu"
    return "mps" if torch.backends.mps.is_available() else "cuda"
