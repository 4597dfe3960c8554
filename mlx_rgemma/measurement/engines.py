"""What every engine that is measured can do, and which there are."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_rgemma.errors import UserError

OURS, MLX_LM, TRANSFORMERS = "mlx_rgemma", "mlx-lm", "transformers"

_HOMES = {
    OURS: "mlx_rgemma.measurement.mlx_engines:Ours",
    MLX_LM: "mlx_rgemma.measurement.mlx_engines:MlxLm",
    TRANSFORMERS: "mlx_rgemma.measurement.torch_engine:Transformers",
}

PEERS = {MLX_LM: ("mlx_lm",), TRANSFORMERS: ("torch", "transformers")}
"""Engines to compare with, and what each needs."""


@dataclass(frozen=True)
class Loaded:
    """A model as an engine holds it.

    Attributes:
        dtype: dtype of its activations.
        quantization: Its bits or mode in a word, or "none".
        weight_bytes: Bytes of its weights.
        read_bytes: Bytes of weights that a decode step reads: more, where quantized weights are
            held in float32 too.
        vocab_size: Number of token ids.
    """

    dtype: str
    quantization: str
    weight_bytes: int
    read_bytes: int
    vocab_size: int


@dataclass(frozen=True)
class Generated:
    """When the tokens of one generation came.

    Attributes:
        first_token_s: Seconds until the first token (of every prompt) was there.
        last_token_s: Seconds until the last one was.
        tokens: Tokens that each prompt got.
        state_bytes: Bytes of the state at the end, of all prompts together.
    """

    first_token_s: float
    last_token_s: float
    tokens: int
    state_bytes: int


LEARNING_RATE = 1e-5
"""Of every engine's AdamW."""


class Unsupported(Exception):
    """What an engine cannot do; the message says it in a few words."""


class Engine(Protocol):
    """A model in some library's hands. Every method returns when all is computed."""

    def load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Loaded:
        """Take a model, `{"folder": ...}` or `{"shape": name}`; None leaves the dtype to it."""

    def generate(self, prompts: list[list[int]], tokens: int, step_size: int) -> Generated:
        """Read prompts of one length and generate, greedily, without end-of-text."""

    def generate_after(self, context: int, tokens: int, step_size: int) -> Generated:
        """Generate with a state that has read `context` tokens; it is read once, then goes on."""

    def train(self, rows: list[list[int]], kind: str) -> float:
        """One step of AdamW on rows of one token more than are read: its seconds.

        `kind` is "full" or "lora".
        """

    def peak_memory(self) -> int | None:
        """Bytes of the allocator's peak since the last call; None where it keeps no count."""


def make_engine(name: str) -> Engine:
    """An engine of this process."""
    module, _, cls = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), cls)()


def check_installed(name: str) -> None:
    """Refuse an engine that this environment does not have.

    Raises:
        UserError: Naming what is missing, and the extra that brings it.
    """
    for module in PEERS[name]:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"--compare {name}: {module} is not installed;"
                " pip install '.[parity]' in a clone brings what is compared with."
            )
