"""Training configuration: command line, then YAML file, then defaults, with mlx-lm's names."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_rgemma.errors import UserError, shortened, shown
from mlx_rgemma.griffin.config import SHAPES, GriffinConfig

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,2}")
"""Numbers such as 1e-5, which YAML 1.1 reads as text."""

MAX_COUNT = 10**9
MAX_SEED = 2**32 - 1
"""mlx-lm's limit: it seeds NumPy."""

MAX_RATE = 1e30
"""Limit of learning rates, norms and the like: their products stay within float32."""

MAX_TOKENS = 1 << 24
"""Limit of a sequence, and of a batch of full sequences."""


def merge_config(
    parser: argparse.ArgumentParser,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    others: Sequence[str] = (),
) -> SimpleNamespace:
    """Merge settings: the command line overrides the configuration file, the file the defaults.

    Args:
        parser: The command's parser; its types and choices apply to the file too.
        given: Parsed arguments; None for those not given.
        defaults: Default of every setting.
        others: More keys that the file may have.

    Raises:
        UserError: For a reason of `read_settings`.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    if given.get("config") is not None:
        found = read_settings(given["config"], parser, [*defaults, *others])
        chosen = {**found, **chosen}
    return SimpleNamespace(**{**copy.deepcopy(dict(defaults)), **chosen})


def read_settings(
    file: str, parser: argparse.ArgumentParser, others: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the settings of a YAML file, each checked like the option of its name.

    Args:
        file: Path of the file.
        parser: The command's parser.
        others: More keys that the file may have.

    Raises:
        UserError: If the file is missing or not YAML, or has an unknown key or a wrong value.
    """
    from mlx_rgemma.io.yaml import read_yaml

    path = Path(file).expanduser()
    values = {key.replace("-", "_"): value for key, value in read_yaml(path).items()}
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    check_keys(str(path), values, [*actions, *others])
    if values.pop("config", None) is not None:
        raise UserError(f"{path}: config: a configuration file cannot name another one.")
    return {
        key: _checked(path, actions.get(key), key, value)
        for key, value in values.items()
        if value is not None
    }


def check_keys(where: str, values: Any, known: Collection[str]) -> None:
    """Refuse unknown settings: a misspelt one would silently do nothing.

    Args:
        where: Beginning of a message.
        values: The settings.
        known: All possible keys.

    Raises:
        UserError: If the settings are not a mapping, or have another key.
    """
    if not isinstance(values, Mapping):
        expected = ", ".join(known)
        raise UserError(f"{where} is {shown(values)}, expected {expected}, each with its value.")
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        similar = get_close_matches(unknown[0][:100], known, n=1)
        hint = f"did you mean {similar[0]}?" if similar else "--help lists them."
        if not similar and len(known) <= 6:
            hint = f"there are {', '.join(known)}."
        raise UserError(f"{where}: unknown setting {shortened(unknown)}; {hint}")


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _checked(path: Path, action: argparse.Action | None, key: str, value: Any) -> Any:
    """Return a value of the file, converted like the option's value on the command line."""

    def refuse(expected: str) -> UserError:
        return UserError(f"{path}: {key} is {shown(value)}, expected {expected}.")

    if action is None:
        return _with_numbers(value)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if action.nargs == "+":
        values = value if isinstance(value, list) else [value]
        if not values or not all(map(_is_text, values)):
            raise refuse("text, or a list of texts")
        return [str(one) for one in values]
    if callable(action.type):
        try:
            value = action.type(str(value))
        except (ValueError, OverflowError, argparse.ArgumentTypeError) as error:
            if not isinstance(error, argparse.ArgumentTypeError):
                kind = getattr(action.type, "__name__", "value")
                raise refuse(f"a {kind}") from error
            raise UserError(f"{path}: {key} is {shown(value)}: {str(error)[:200]}.") from error
    elif not _is_text(value):
        raise refuse("text")
    if action.choices is not None and value not in action.choices:
        raise refuse(f"one of {', '.join(map(str, action.choices))}")
    return value if callable(action.type) else str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of pre-training; the names are those of the options and of the YAML file.

    Attributes:
        data: Text files or folders, each with its weight as ``PLACE=WEIGHT``.
        valid_data: Files or folders of the validation set; by default a part of `data`.
        valid_fraction: Fraction of the documents of `data` in the validation set.
        whole_files: Each file is one document; otherwise blank lines separate documents.
        init_from: Folder of a model to train further, with its tokenizer.
        shape: Key of `SHAPES`.
        shape_changes: Keys of `config.json` that differ from it.
        vocab_size: Vocabulary of the trained tokenizer; None for 2048, or fewer if the text does
            not support 2048.
        tokenizer: A `tokenizer.model` to use instead.
        context_length: Tokens per sequence.
        batch_size: Sequences per iteration.
        iters: Iterations.
        grad_accumulation_steps: Iterations per update.
        learning_rate: The highest learning rate.
        min_learning_rate: The learning rate after the last update.
        lr_decay: "cosine", "linear" or "constant".
        warmup: Updates until the highest learning rate.
        weight_decay: Weight decay of matrices.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        dropout: Dropout probability of values, and of whole input tokens.
        average_decay: Decay of the EMA that is evaluated and exported; 0 for none.
        dtype: dtype of the computation.
        save_dtype: dtype of the exported weights.
        seed: Seed of all random numbers.
        steps_per_report, steps_per_eval, steps_per_save: Iterations between two.
        sample_prompt: Prompt of the text generated after each evaluation; empty for none.
        sample_tokens: Length of that text.
    """

    data: tuple[str, ...] = ()
    valid_data: tuple[str, ...] = ()
    valid_fraction: float = 0.01
    whole_files: bool = False
    init_from: str | None = None
    shape: str = "tiny"
    shape_changes: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    tokenizer: str | None = None
    context_length: int = 512
    batch_size: int = 4
    iters: int = 1000
    grad_accumulation_steps: int = 1
    learning_rate: float = 3e-3
    min_learning_rate: float = 0.0
    lr_decay: str = "cosine"
    warmup: int = 100
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    average_decay: float = 0.0
    dtype: str = "float32"
    save_dtype: str = "bfloat16"
    seed: int = 0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    steps_per_save: int = 100
    sample_prompt: str = "Once upon a time"
    sample_tokens: int = 60

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def model_config(self, vocab_size: int) -> GriffinConfig:
        """Return the configuration of a model that is trained from scratch."""
        shape, changes = SHAPES[self.shape], dict(self.shape_changes)
        if (width := changes.get("hidden_size")) is not None:
            heads = changes.get("num_attention_heads", shape.num_attention_heads)
            derived = {"head_dim": width // heads, "lru_width": width}
            changes = {**derived, "intermediate_size": 6 * width, **changes}
        return replace(shape, vocab_size=vocab_size, dtype=None, **changes)
