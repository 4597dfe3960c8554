"""Sampling options with mlx-lm's names: defaults, bounds, and the functions built from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from mlx_rgemma.errors import UserError, shown

if TYPE_CHECKING:
    from mlx_rgemma.generation.decode import LogitsProcessor
    from mlx_rgemma.generation.decode import Sampler as SamplerFunction

P = ParamSpec("P")
R = TypeVar("R")

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**64 - 1
MIN_TEMP = 1e-6
"""Lower temperatures are greedy: logits divided by them could overflow."""

BOUNDS: dict[str, tuple[float, float]] = {
    "temp": (0, 1000),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "min_tokens_to_keep": (1, MAX_COUNT),
    "top_k": (0, MAX_COUNT),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
    "seed": (0, MAX_SEED),
    "repetition_penalty": (0, 1000),
    "repetition_context_size": (1, MAX_COUNT),
    "presence_penalty": (-1000, 1000),
    "presence_context_size": (1, MAX_COUNT),
    "frequency_penalty": (-1000, 1000),
    "frequency_context_size": (1, MAX_COUNT),
}
"""The lowest and the highest value of each numeric option."""

SAMPLER_OPTIONS = (
    "temp",
    "top_p",
    "min_p",
    "min_tokens_to_keep",
    "top_k",
    "xtc_probability",
    "xtc_threshold",
)
"""Options of the sampler."""


@dataclass(frozen=True)
class SamplingOptions:
    """The parameters of mlx-lm's `make_sampler` and `make_logits_processors`, and a seed.

    Attributes:
        temp: Temperature; 0 takes the most probable token.
        top_p: Keep the most probable tokens of this total probability; 1 for all.
        min_p: Keep tokens of at least this share of the highest probability; 0 for all.
        min_tokens_to_keep: Tokens that `min_p` keeps in any case.
        top_k: Keep this many of the most probable tokens; 0 for all.
        xtc_probability: Probability per token of excluding the top choices (XTC).
        xtc_threshold: Probability from which on XTC excludes a token.
        seed: Seeds MLX's random numbers before the first token.
        repetition_penalty: Divides positive logits of recent tokens; 0 or None for no penalty.
        presence_penalty: Subtracted from the logits of recent tokens.
        frequency_penalty: Subtracted once per occurrence.
        repetition_context_size, presence_context_size, frequency_context_size: Recent tokens that
            each penalty covers.
        logit_bias: Added to the logits of these tokens.

    Raises:
        UserError: If a value is out of bounds.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in BOUNDS and value is not None:
                whole = "int" in str(field.type)
                check_number(field.name, value, *BOUNDS[field.name], whole=whole)
                # `mx.compile` accepts Python's numbers, but not NumPy's.
                object.__setattr__(self, field.name, int(value) if whole else float(value))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplingOptions:
        """Pick the options from the arguments of a function or command, by name."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def functions(
        self,
        tokenizer: Any,
        vocab_size: int,
        *,
        sampler: SamplerFunction | None = None,
        logits_processors: Sequence[LogitsProcessor] | None = None,
        speculative: bool = False,
    ) -> tuple[SamplerFunction, list[LogitsProcessor]]:
        """Return the sampler and the logits processors.

        Args:
            tokenizer: From `load`.
            vocab_size: Tokens of the vocabulary.
            sampler: A sampler of the caller, in place of one from these options.
            logits_processors: Processors of the caller, applied after those of these options.
            speculative: Whether speculative decoding needs the sampler's distribution.

        Raises:
            UserError: If both a sampler and its options are given, or `logit_bias` has an unknown
                token.
        """
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if sampler is not None:
            if clash := [name for name in SAMPLER_OPTIONS if name in given]:
                raise UserError(
                    f"sampler and {clash[0]} were both given: a sampler replaces the"
                    " sampling options. Leave one of the two out."
                )
            choose = sampler
        else:
            choose = self._sampler(tokenizer, vocab_size, speculative)
        processors = list(logits_processors or ())
        if any(name.endswith("penalty") for name in given) or self.logit_bias:
            from mlx_lm.sample_utils import make_logits_processors

            made: list[Any] = make_logits_processors(
                logit_bias=self._bias(vocab_size),
                repetition_penalty=self.repetition_penalty,
                repetition_context_size=self.repetition_context_size,
                presence_penalty=self.presence_penalty,
                presence_context_size=self.presence_context_size,
                frequency_penalty=self.frequency_penalty,
                frequency_context_size=self.frequency_context_size,
            )
            processors = made + processors
        return choose, processors

    def _sampler(self, tokenizer: Any, vocab_size: int, speculative: bool) -> SamplerFunction:
        from mlx_rgemma.generation.sampling import Sampler

        temp = self.temp if self.temp >= MIN_TEMP else 0.0
        common: dict[str, Any] = {
            "top_p": self.top_p,
            "min_p": self.min_p,
            "min_tokens_to_keep": min(self.min_tokens_to_keep, vocab_size),
            "top_k": self.top_k if self.top_k < vocab_size else 0,  # mlx-lm refuses more
        }
        if temp == 0 or (speculative and not self.xtc_probability):
            return Sampler(temp, **common)

        from mlx_lm.sample_utils import make_sampler  # a second to import: not for greedy decoding

        special = [*tokenizer.encode("\n", add_special_tokens=False), *tokenizer.eos_token_ids]
        # mlx-lm uses them as indices; a reduced vocabulary may lack some.
        never_excluded = [token for token in special if 0 <= token < vocab_size]
        made: SamplerFunction = make_sampler(
            temp,
            **common,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=never_excluded,
        )
        return made

    def _bias(self, vocab_size: int) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        for token, value in self.logit_bias.items():
            check_number("logit_bias: token", token, 0, vocab_size - 1, whole=True)
            check_number(f"logit_bias[{token}]", value, -1e9, 1e9)
        return {int(token): float(value) for token, value in self.logit_bias.items()}


def check_number(
    name: str, value: Any, low: float, high: float = MAX_COUNT, *, whole: bool = False
) -> None:
    """Refuse anything but a number (an integer) between two bounds.

    Raises:
        UserError: Naming the argument, what was found and what was expected.
    """
    kind: type = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # type: ignore[operator]
        what = "an integer" if whole else "a number"
        bounds = f"of at least {low}" if high == MAX_COUNT else f"between {low} and {high}"
        raise UserError(f"{name} is {shown(value)}, expected {what} {bounds}.")


def check_max_tokens(value: Any) -> None:
    """Refuse an invalid number of tokens to generate.

    Raises:
        UserError: If it is below 1 and not -1, which means no limit.
    """
    if value != -1 or isinstance(value, bool):
        try:
            check_number("max_tokens", value, 1, math.inf, whole=True)
        except UserError as error:
            message = f"max_tokens is {shown(value)}, expected at least 1 (or -1 for no limit)."
            raise UserError(message) from error


def suggest(function: Callable[P, R]) -> Callable[P, R]:
    """Let the TypeError of an unknown keyword name the closest known one."""
    known = signature(function).parameters

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                closest = get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean '{closest[0]}'?" if closest else "see help()."
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}; {hint}"
                )
        return function(*args, **kwargs)

    return call
