"""The interface of engines, and the list of them."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation.machine import package_version
from mlx_rgemma.evaluation.timing import Generated

OURS, MLX_LM, TRANSFORMERS = "mlx_rgemma", "mlx-lm", "transformers"

_LAZY_IMPORTS = {
    OURS: "benchmarks.harness.mlx_engines:MlxRGemma",
    MLX_LM: "benchmarks.harness.mlx_engines:MlxLm",
    TRANSFORMERS: "benchmarks.harness.torch_engine:Transformers",
}

BASELINES = {MLX_LM: ("mlx_lm",), TRANSFORMERS: ("torch", "transformers")}
"""Engines to compare with, and the packages that each needs."""


@dataclass(frozen=True)
class Loaded:
    """A model as an engine loaded it.

    Attributes:
        dtype: dtype of its activations.
        quantization: Its bits or mode, or "none".
        weight_bytes: Bytes of its weights.
        read_bytes: Bytes of weights that a decode step reads: more if dequantized weights are
            cached.
        vocab_size: Number of token ids.
    """

    dtype: str
    quantization: str
    weight_bytes: int
    read_bytes: int
    vocab_size: int


class Unsupported(Exception):
    """An operation that an engine does not have; the message completes "it ..."."""


class Engine(Protocol):
    """A model in one library. Every method returns after its results are evaluated."""

    def load(self, model: dict[str, Any], dtype: str | None, quantization: str) -> Loaded:
        """Load `{"folder": ...}` or `{"shape": name}`; dtype None is the library's default."""

    def generate(self, prompts: list[list[int]], tokens: int, step_size: int) -> Generated:
        """Read prompts of one length and generate greedily, with no end of text."""

    def generate_after(self, context: int, tokens: int, step_size: int) -> Generated:
        """Generate from a state that has read `context` tokens; the text is read once."""

    def train(self, sequences: list[list[int]], kind: str) -> float:
        """Return the seconds of one step of AdamW on (B, L + 1) token ids.

        `kind` is "full" or "lora".
        """

    def peak_memory(self) -> int | None:
        """Return the allocator's peak in bytes since the last call; None if it is not known."""


def make_engine(name: str) -> Engine:
    """Return an engine of this process."""
    module, _, cls = _LAZY_IMPORTS[name].partition(":")
    return getattr(importlib.import_module(module), cls)()


def check_installed(name: str) -> None:
    """Refuse an engine that is not installed.

    Raises:
        UserError: If a package is missing; the message names it and the extra.
    """
    for module in BASELINES[name]:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"--compare {name}: {module} is not installed;"
                " pip install '.[parity]' in a clone installs the engines to compare with."
            )


def describe_baseline(name: str) -> dict[str, Any]:
    """Return facts about an engine to compare with, as JSON values."""
    if name == TRANSFORMERS:
        import torch

        own = "MKL" if torch.backends.mkl.is_available() else "its own BLAS"
        onednn = " and oneDNN" if torch.backends.mkldnn.is_available() else ""
        return {
            "packages": {
                package: package_version(package) for package in ("transformers", "torch")
            },
            "products": f"{own}{onednn}, in the torch wheel",
            "cores": torch.get_num_threads(),
        }
    return {"packages": {"mlx-lm": package_version("mlx-lm")}, "products": "MLX"}
