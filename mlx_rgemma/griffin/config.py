"""The shape of a Griffin model: every spelling of the released configurations, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mlx_rgemma.errors import ConfigError

MODEL_TYPE = "recurrent_gemma"
RECURRENT, ATTENTION = "recurrent", "attention"
BLOCK_TYPES = (RECURRENT, RECURRENT, ATTENTION)
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_tanh", "gelu_approx")


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
            what the released models were trained with), or W - 1 before it (`window="hf"`).
        block_types: One cycle of temporal blocks, repeated (and cut short) to the depth.
        conv1d_width: Taps of the temporal convolution.
        logits_soft_cap: Cap of the logits; 0 for none.
        embeddings_scale_by_sqrt_dim: Whether embeddings are multiplied by sqrt(hidden_size).
        rope_theta: Base of the rotary frequencies.
        partial_rotary_factor: Share of each head that is rotated.
        rms_norm_eps: Epsilon of all norms.
        attention_bias: Whether the q, k and v projections have a bias.
        num_key_value_heads: Always 1.
        tie_word_embeddings: Always true: the head is the embedding.
        dtype: dtype that the file names for its weights, if it does.
        bos_token_id, pad_token_id: Special tokens, if named.
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

        Where a file carries two spellings of one thing, the one that transformers reads today
        counts (`block_types`, `rope_parameters`, `dtype`). Unknown keys are ignored.

        Raises:
            ConfigError: If a key is missing or cannot be; the message names it.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("the configuration is not a JSON object.")
        if values.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f"model_type is {values.get('model_type')!r}; this package runs"
                f" '{MODEL_TYPE}' models only."
            )
        activation = values.get("hidden_activation") or ACTIVATIONS[0]
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_activation is {activation!r}; RecurrentGemma has '{ACTIVATIONS[0]}'."
            )
        read = _Reader(values)
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
            block_types=read.block_types(),
            conv1d_width=read.integer("conv1d_width", 4),
            logits_soft_cap=read.soft_cap(),
            embeddings_scale_by_sqrt_dim=read.boolean("embeddings_scale_by_sqrt_dim", True),
            rope_theta=read.rope("rope_theta", 10000.0),
            partial_rotary_factor=read.rope("partial_rotary_factor", 0.5),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            attention_bias=read.boolean("attention_bias", False),
            num_key_value_heads=read.integer("num_key_value_heads", 1),
            tie_word_embeddings=read.boolean("tie_word_embeddings", True),
            dtype=read.dtype(),
            bos_token_id=read.token("bos_token_id"),
            pad_token_id=read.token("pad_token_id"),
            eos_token_ids=read.tokens("eos_token_id"),
            quantization=read.quantization(),
            window=values.get("window", "google"),
        )

    @classmethod
    def preset(cls, name: str) -> GriffinConfig:
        """The shape of a released model: "2b" or "9b" (also for the -it variants)."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return PRESETS[name]

    def to_dict(self) -> dict[str, Any]:
        """A `config.json` that this package, mlx-lm and transformers (4 and 5) all read."""
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

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The temporal block of each layer: the cycle repeated, the last one cut short."""
        cycle = self.block_types
        return tuple(cycle[i % len(cycle)] for i in range(self.num_hidden_layers))

    @property
    def past_window(self) -> int:
        """How many past tokens a query sees beside its own."""
        return self.attention_window_size - (self.window == "hf")

    @property
    def rotary_dims(self) -> int:
        """How many channels of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def with_window(self, window: str) -> GriffinConfig:
        """The same model under another window rule, "google" or "hf"."""
        return replace(self, window=window)


class _Reader:
    """Typed access to the values of a config file; null counts as missing."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(f"rope_parameters is {rope!r}, expected an object.")
        kind = rope.get("rope_type", "default")
        if kind != "default":
            raise ConfigError(
                f"rope_parameters.rope_type is {kind!r}; RecurrentGemma has 'default'."
            )
        self.rope_parameters = rope

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{key} is missing.")
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{key} is {value!r}, expected a whole number.")
        return value

    def number(self, key: str, default: float) -> float:
        return self._number(key, self.values.get(key), default)

    def soft_cap(self) -> float:
        """A cap that is spelled out as null means none; a missing one is the released 30."""
        return self.number("logits_soft_cap", 0.0 if "logits_soft_cap" in self.values else 30.0)

    def rope(self, key: str, default: float) -> float:
        value = self.rope_parameters.get(key)
        return self._number(key, self.values.get(key) if value is None else value, default)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}, expected true or false.")
        return value

    def block_types(self) -> tuple[str, ...]:
        for key in ("block_types", "_block_types"):
            value = self.values.get(key)
            if value is not None:
                if not isinstance(value, list | tuple) or not value:
                    raise ConfigError(f"{key} is {value!r}, expected a list of block types.")
                return tuple(value)
        return BLOCK_TYPES

    def dtype(self) -> str | None:
        for key in ("dtype", "torch_dtype"):
            value = self.values.get(key)
            if value is not None:
                name = str(value).removeprefix("torch.")
                if name not in DTYPES:
                    raise ConfigError(f"{key} is {value!r}, expected one of {', '.join(DTYPES)}.")
                return name
        return None

    def token(self, key: str) -> int | None:
        value = self.values.get(key)
        return None if value is None else self.integer(key)

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        if value is None:
            return (1,)
        value = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise ConfigError(f"{key} is {self.values[key]!r}, expected token ids.")
        return tuple(value)

    def quantization(self) -> Mapping[str, Any] | None:
        value = self.values.get("quantization") or self.values.get("quantization_config")
        if value is None:
            return None
        if not isinstance(value, Mapping) or "bits" not in value or "group_size" not in value:
            raise ConfigError(
                "quantization is not MLX's ({group_size, bits, mode}); convert the unquantized"
                " model instead."
            )
        return value

    @staticmethod
    def _number(key: str, value: Any, default: float) -> float:
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{key} is {value!r}, expected a number.")
        if not math.isfinite(value):
            raise ConfigError(f"{key} is {value!r}, expected a finite number.")
        return float(value)


def _divides(name: str, divisor: int, of: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise ConfigError(f"{name} is {divisor}, which does not divide {of} {value}.")


def _validate(c: GriffinConfig) -> None:
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "lru_width",
        "attention_window_size",
        "conv1d_width",
    ):
        if getattr(c, key) < 1:
            raise ConfigError(f"{key} is {getattr(c, key)}, expected at least 1.")
    if c.model_type != MODEL_TYPE:
        raise ConfigError(f"model_type is {c.model_type!r}, expected '{MODEL_TYPE}'.")
    _divides("num_attention_heads", c.num_attention_heads, "hidden_size", c.hidden_size)
    _divides("num_attention_heads", c.num_attention_heads, "lru_width", c.lru_width)
    if c.intermediate_size % 2:
        raise ConfigError(
            f"intermediate_size is {c.intermediate_size}; it is twice the MLP's inner width"
            " and must be even."
        )
    for block in c.block_types:
        if block not in (RECURRENT, ATTENTION):
            raise ConfigError(
                f"block_types holds {block!r}, expected '{RECURRENT}' or '{ATTENTION}'."
            )
    if not c.block_types:
        raise ConfigError("block_types is empty.")
    if c.num_key_value_heads != 1:
        raise ConfigError(
            f"num_key_value_heads is {c.num_key_value_heads}; RecurrentGemma's attention has 1."
        )
    if not c.tie_word_embeddings:
        raise ConfigError("tie_word_embeddings is false; RecurrentGemma's head is its embedding.")
    if c.logits_soft_cap < 0:
        raise ConfigError(f"logits_soft_cap is {c.logits_soft_cap}, expected 0 (none) or more.")
    for key in ("rope_theta", "rms_norm_eps"):
        if getattr(c, key) <= 0:
            raise ConfigError(f"{key} is {getattr(c, key)}, expected more than 0.")
    if not 0 < c.partial_rotary_factor <= 1 or c.rotary_dims < 2 or c.rotary_dims % 2:
        raise ConfigError(
            f"partial_rotary_factor is {c.partial_rotary_factor} with head_dim {c.head_dim}:"
            " the rotated part must be an even number of channels."
        )
    if c.window not in ("google", "hf"):
        raise ConfigError(f"window is {c.window!r}, expected 'google' or 'hf'.")


def _released(hidden_size: int, heads: int, layers: int, intermediate_size: int) -> GriffinConfig:
    return GriffinConfig(
        vocab_size=256000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=hidden_size // heads,
        lru_width=hidden_size,
        attention_window_size=2048,
        dtype="bfloat16",
    )


PRESETS = {
    "2b": _released(2560, 10, 26, 15360),
    "9b": _released(4096, 16, 38, 24576),
}
"""The released shapes."""
