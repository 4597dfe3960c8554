"""Sizes and constants of a Griffin model, read from any released `config.json` and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from mlx_rgemma.errors import ConfigError, shown
from mlx_rgemma.griffin.config_reader import ConfigReader, as_float, is_int

MODEL_TYPE = "recurrent_gemma"
RECURRENT, ATTENTION = "recurrent", "attention"
BLOCK_TYPES = (RECURRENT, RECURRENT, ATTENTION)
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_tanh", "gelu_approx")

MAX_INT32 = 2**31 - 1
"""MLX counts elements along an axis, and Metal kernels within a row, in int32."""
MAX_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "head_dim": 1 << 16,
    "lru_width": 1 << 20,
    "attention_window_size": 1 << 30,
    "conv1d_width": 1 << 8,
}
"""Largest accepted value per size; the smallest is 1."""
RANGES = {
    "logits_soft_cap": (1e-3, 1e6),
    "rope_theta": (1.0, 1e15),
    "partial_rotary_factor": (1e-6, 1.0),
    "rms_norm_eps": (1e-30, 1.0),
}
"""Accepted range per constant, in float32 with its reciprocals; a cap of 0 means none."""
MAX_BLOCK_TYPES = MAX_SIZES["num_hidden_layers"]
MAX_STOP_TOKENS = 1024


@dataclass(frozen=True)
class GriffinConfig:
    """Sizes and constants of a RecurrentGemma model, with the names of its `config.json`.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        intermediate_size: Twice the inner width of the MLP (its gate and up branch together).
        num_hidden_layers: Number of residual blocks.
        num_attention_heads: Heads of the attention, and blocks of the RG-LRU's gates.
        head_dim: Width of an attention head.
        lru_width: Width of the recurrence.
        attention_window_size: W. A query sees its own key and the W before it (`window="google"`,
            as the released models were trained), or W - 1 before it (`window="hf"`).
        block_types: One cycle of temporal blocks, repeated up to the depth.
        conv1d_width: Kernel size of the temporal convolution.
        logits_soft_cap: Cap of the logits; 0 for none.
        embeddings_scale_by_sqrt_dim: Whether embeddings are multiplied by sqrt(hidden_size).
        rope_theta: Base of the rotary frequencies.
        partial_rotary_factor: Share of each head that is rotated.
        rms_norm_eps: Epsilon of all norms.
        attention_bias: Whether the q, k and v projections have a bias.
        num_key_value_heads: Always 1.
        tie_word_embeddings: Always true: the head is the embedding.
        dtype: dtype of the weights, if the file names it.
        bos_token_id, pad_token_id: Special tokens, if any.
        eos_token_ids: The tokens that end a text.
        quantization: MLX's quantization section, if the weights are quantized.
        window: "google" or "hf": see `attention_window_size`.
        model_type: Always "recurrent_gemma".
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    lru_width: int
    attention_window_size: int
    block_types: tuple[str, ...] = BLOCK_TYPES
    conv1d_width: int = 4
    logits_soft_cap: float = 30.0
    embeddings_scale_by_sqrt_dim: bool = True
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    num_key_value_heads: int = 1
    tie_word_embeddings: bool = True
    dtype: str | None = None
    bos_token_id: int | None = 2
    pad_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = (1,)
    quantization: Mapping[str, Any] | None = None
    window: str = "google"
    model_type: str = MODEL_TYPE

    def __post_init__(self) -> None:
        _validate(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GriffinConfig:
        """Read a `config.json` of any age: Hugging Face's, mlx-lm's or this package's.

        If a file has two spellings of one value, the one that current transformers reads counts
        (`block_types`, `rope_parameters`, `dtype`). Unknown keys are ignored.

        Raises:
            ConfigError: If a key is missing or invalid; the message names it.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("the configuration is not a JSON object.")
        if values.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f"model_type is {shown(values.get('model_type'))}; this package runs"
                f" '{MODEL_TYPE}' models only."
            )
        activation = values.get("hidden_activation") or ACTIVATIONS[0]
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_activation is {shown(activation)}; RecurrentGemma has '{ACTIVATIONS[0]}'."
            )
        read = ConfigReader(values)
        hidden_size = read.integer("hidden_size")
        heads = read.integer("num_attention_heads")
        _divides("num_attention_heads", heads, "hidden_size", hidden_size)
        return cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size"),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=heads,
            head_dim=read.integer("head_dim", hidden_size // heads),
            lru_width=read.integer("lru_width", hidden_size),
            attention_window_size=read.integer("attention_window_size"),
            block_types=read.block_types(BLOCK_TYPES),
            conv1d_width=read.integer("conv1d_width", 4),
            logits_soft_cap=read.soft_cap(),
            embeddings_scale_by_sqrt_dim=read.boolean("embeddings_scale_by_sqrt_dim", True),
            rope_theta=read.rope("rope_theta", 10000.0),
            partial_rotary_factor=read.rope("partial_rotary_factor", 0.5),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            attention_bias=read.boolean("attention_bias", False),
            num_key_value_heads=read.integer("num_key_value_heads", 1),
            tie_word_embeddings=read.boolean("tie_word_embeddings", True),
            dtype=read.dtype(DTYPES),
            bos_token_id=read.token("bos_token_id"),
            pad_token_id=read.token("pad_token_id"),
            eos_token_ids=read.tokens("eos_token_id"),
            quantization=read.quantization(),
            window=values.get("window", "google"),
        )

    @classmethod
    def preset(cls, name: str) -> GriffinConfig:
        """Return the configuration of a released model: "2b" or "9b" (with or without -it)."""
        if name not in PRESETS:
            raise ConfigError(
                f"there is no preset {shown(name)}; choose one of {', '.join(PRESETS)}."
            )
        return PRESETS[name]

    def to_dict(self) -> dict[str, Any]:
        """Return a `config.json` that this package, mlx-lm and transformers (4 and 5) read."""
        values: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("eos_token_ids", "dtype", "quantization", "window")
        }
        values["block_types"] = list(self.block_types)
        values["architectures"] = ["RecurrentGemmaForCausalLM"]
        values["attention_dropout"] = 0.0
        values["hidden_activation"] = ACTIVATIONS[0]
        values["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        eos = list(self.eos_token_ids)
        values["eos_token_id"] = eos[0] if len(eos) == 1 else eos
        if self.dtype is not None:
            values["torch_dtype"] = values["dtype"] = self.dtype
        if self.quantization is not None:
            values["quantization"] = values["quantization_config"] = dict(self.quantization)
        if self.window != "google":
            values["window"] = self.window
        return values

    @cached_property
    def layer_types(self) -> tuple[str, ...]:
        """Temporal block type per layer."""
        cycle = self.block_types
        return tuple(cycle[i % len(cycle)] for i in range(self.num_hidden_layers))

    @cached_property
    def past_window(self) -> int:
        """Past tokens that a query sees, besides its own."""
        return self.attention_window_size - (self.window == "hf")

    @property
    def rotary_dims(self) -> int:
        """Rotated channels per head."""
        return int(self.head_dim * self.partial_rotary_factor)

    def with_window(self, window: str) -> GriffinConfig:
        """Return the same configuration with another window rule, "google" or "hf"."""
        return replace(self, window=window)


def _divides(name: str, divisor: int, of: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise ConfigError(f"{name} is {shown(divisor)}, which does not divide {of} {shown(value)}.")


def _validate(c: GriffinConfig) -> None:
    """Check types and ranges, so that no size overflows an index of MLX."""
    for key, maximum in MAX_SIZES.items():
        value = getattr(c, key)
        if not is_int(value):
            raise ConfigError(f"{key} is {shown(value)}, expected an integer.")
        if not 1 <= value <= maximum:
            raise ConfigError(f"{key} is {shown(value)}, expected 1 to {maximum}.")
    for key, (low, high) in RANGES.items():
        value = as_float(key, getattr(c, key))
        if not low <= value <= high and not (key == "logits_soft_cap" and value == 0):
            none = "0 (none) or " if key == "logits_soft_cap" else ""
            raise ConfigError(f"{key} is {value:g}, expected {none}{low:g} to {high:g}.")
    if c.model_type != MODEL_TYPE:
        raise ConfigError(f"model_type is {shown(c.model_type)}, expected '{MODEL_TYPE}'.")
    _divides("num_attention_heads", c.num_attention_heads, "hidden_size", c.hidden_size)
    _divides("num_attention_heads", c.num_attention_heads, "lru_width", c.lru_width)
    if c.intermediate_size % 2:
        raise ConfigError(
            f"intermediate_size is {c.intermediate_size}; it is twice the MLP's inner width"
            " and must be even."
        )
    if not 1 <= len(c.block_types) <= MAX_BLOCK_TYPES:
        raise ConfigError(
            f"block_types has {len(c.block_types)} entries, expected 1 to {MAX_BLOCK_TYPES}."
        )
    for block in c.block_types:
        if block not in (RECURRENT, ATTENTION):
            raise ConfigError(
                f"block_types holds {shown(block)}, expected '{RECURRENT}' or '{ATTENTION}'."
            )
    if c.num_key_value_heads != 1:
        raise ConfigError(
            f"num_key_value_heads is {shown(c.num_key_value_heads)}; RecurrentGemma's attention"
            " has 1."
        )
    if not c.tie_word_embeddings:
        raise ConfigError("tie_word_embeddings is false; RecurrentGemma's head is its embedding.")
    if c.rotary_dims < 2 or c.rotary_dims % 2:
        raise ConfigError(
            f"partial_rotary_factor is {c.partial_rotary_factor} with head_dim {c.head_dim}:"
            " the rotated part must be an even number of channels."
        )
    _validate_tokens(c)
    _validate_products(c)
    if c.window not in ("google", "hf"):
        raise ConfigError(f"window is {shown(c.window)}, expected 'google' or 'hf'.")


def _validate_tokens(c: GriffinConfig) -> None:
    """Check the special tokens. They may be outside of a vocabulary that was reduced."""
    if len(c.eos_token_ids) > MAX_STOP_TOKENS:
        raise ConfigError(
            f"eos_token_id has {len(c.eos_token_ids)} entries, expected at most {MAX_STOP_TOKENS}."
        )
    named = [("eos_token_id", token) for token in c.eos_token_ids]
    named += [
        (key, getattr(c, key))
        for key in ("bos_token_id", "pad_token_id")
        if getattr(c, key) is not None
    ]
    for key, token in named:
        if not is_int(token) or not 0 <= token <= MAX_INT32:
            raise ConfigError(f"{key} holds {shown(token)}, expected token ids (integers from 0).")


def _validate_products(c: GriffinConfig) -> None:
    """Check the number of elements of the largest arrays."""
    queries = (c.num_attention_heads + 2) * c.head_dim
    for what, elements in (
        ("vocab_size x hidden_size", c.vocab_size * c.hidden_size),
        ("intermediate_size x hidden_size", c.intermediate_size * c.hidden_size),
        ("2 lru_width x hidden_size", 2 * c.lru_width * c.hidden_size),
        ("(num_attention_heads + 2) head_dim x hidden_size", queries * c.hidden_size),
        (
            "2 (attention_window_size + 1) x head_dim",
            2 * (c.attention_window_size + 1) * c.head_dim,
        ),
        ("lru_width^2 / num_attention_heads", c.lru_width**2 // c.num_attention_heads),
    ):
        if elements > MAX_INT32:
            raise ConfigError(f"{what} is {elements}, expected at most {MAX_INT32} (int32).")


def _shape(
    hidden_size: int,
    heads: int,
    layers: int,
    *,
    window: int = 2048,
    vocab_size: int = 256000,
    dtype: str = "bfloat16",
) -> GriffinConfig:
    return GriffinConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=6 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=hidden_size // heads,
        lru_width=hidden_size,
        attention_window_size=window,
        dtype=dtype,
    )


PRESETS = {"2b": _shape(2560, 10, 26), "9b": _shape(4096, 16, 38)}
"""Shapes of the released models."""

SHAPES = {
    "micro": _shape(64, 2, 3, vocab_size=512, dtype="float32"),
    "tiny": _shape(192, 4, 6, window=128, vocab_size=2048, dtype="float32"),
    "small": _shape(512, 8, 12, window=512, vocab_size=2048, dtype="float32"),
    "40m": _shape(512, 8, 12, vocab_size=4096, dtype="float32"),
    **PRESETS,
}
"""All shapes that commands know. The embedded model is a `tiny`; training chooses the vocabulary.
`micro` (tests) and `40m` (39.7 million parameters) are for benchmarks: they have the released
models' attention window."""
