"""Typed, checked access to the values of a `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_rgemma.errors import ConfigError, shown


class ConfigReader:
    """Typed access to the values of a config file; null counts as missing."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.rope_parameters: Mapping[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):  # the later one takes precedence
            section = values.get(name) or {}
            if not isinstance(section, Mapping):
                raise ConfigError(f"{name} is {shown(section)}, expected an object.")
            for key in ("type", "rope_type"):  # the old key, and today's
                kind = section.get(key)
                if kind not in (None, "default"):
                    raise ConfigError(
                        f"{name}.{key} is {shown(kind)}; RecurrentGemma has 'default'."
                    )
            self.rope_parameters = section or self.rope_parameters

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{key} is missing.")
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not is_int(value):
            raise ConfigError(f"{key} is {shown(value)}, expected an integer.")
        return value  # `GriffinConfig` checks its range

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        return as_float(key, default if value is None else value)

    def soft_cap(self) -> float:
        """Return the cap: null means none, a missing key the released 30."""
        return self.number("logits_soft_cap", 0.0 if "logits_soft_cap" in self.values else 30.0)

    def rope(self, key: str, default: float) -> float:
        for values in (self.rope_parameters, self.values):
            if values.get(key) is not None:
                return as_float(key, values[key])
        return default

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is {shown(value)}, expected true or false.")
        return value

    def block_types(self, default: tuple[str, ...]) -> tuple[str, ...]:
        for key in ("block_types", "_block_types"):
            value = self.values.get(key)
            if value is not None:
                if not isinstance(value, list | tuple) or not value:
                    raise ConfigError(f"{key} is {shown(value)}, expected a list of block types.")
                return tuple(value)
        return default

    def dtype(self, known: tuple[str, ...]) -> str | None:
        for key in ("dtype", "torch_dtype"):
            value = self.values.get(key)
            if value is not None:
                name = value.removeprefix("torch.") if isinstance(value, str) else value
                if name not in known:
                    raise ConfigError(
                        f"{key} is {shown(value)}, expected one of {', '.join(known)}."
                    )
                return name
        return None

    def token(self, key: str) -> int | None:
        value = self.values.get(key)
        return None if value is None else self.integer(key)

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        if value is None:
            return (1,)
        return tuple(value) if isinstance(value, list | tuple) else (value,)

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


def as_float(key: str, value: Any) -> float:
    """Return a finite number as a float.

    Raises:
        ConfigError: If it is anything else; the message names the key.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} is {shown(value)}, expected a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{key} is {shown(value)}, expected a finite number.")
    return number


def is_int(value: Any) -> bool:
    """Return whether a value is an integer and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)
