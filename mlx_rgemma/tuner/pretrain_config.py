"""Everything that decides how a model is trained from scratch, or further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.griffin.config import SHAPES, GriffinConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the names are those of the command's options and of a YAML recipe.

    Attributes:
        data: Text files or folders, each with its share as ``PLACE=WEIGHT``.
        valid_data: Files or folders of held-out text; by default a part of `data`.
        valid_fraction: The share of the documents of `data` held out.
        whole_files: Each file is one document, instead of one a paragraph block.
        init_from: Folder of a model to train further, with its tokenizer.
        shape: "tiny", "small", "2b" or "9b".
        shape_changes: Keys of `config.json` that differ from it.
        vocab_size: Tokens of the tokenizer that is trained; None for 2048, or fewer if the text
            does not support so many.
        tokenizer: A `tokenizer.model` to use instead.
        context_length: Tokens of a row.
        batch_size: Rows of an iteration.
        iters: Iterations.
        grad_accumulation_steps: Iterations to an update.
        learning_rate: The highest.
        min_learning_rate: After the last update.
        lr_decay: "cosine", "linear" or "constant".
        warmup: Updates until the highest learning rate.
        weight_decay: Of matrices.
        max_grad_norm: Longer gradients are shortened to it; 0 leaves them.
        dropout: Probability with which a value, or a whole token that is read, is dropped.
        average_decay: Of the average of the weights that is evaluated and exported; 0 for none.
        dtype: Of computation.
        save_dtype: Of the exported weights.
        seed: Of everything that is left to chance.
        steps_per_report, steps_per_eval, steps_per_save: Iterations between two.
        sample_prompt: Begins the text that is written after each evaluation; empty for none.
        sample_tokens: Its length.
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
        """JSON values."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def config(self, vocab_size: int) -> GriffinConfig:
        """The shape of the model that is trained from scratch."""
        if self.shape not in SHAPES:
            raise UserError(f"shape: found {shown(self.shape)}, expected {', '.join(SHAPES)}.")
        preset = SHAPES[self.shape]
        values = {f.name: getattr(preset, f.name) for f in fields(preset)}
        values |= {"vocab_size": vocab_size, "dtype": None}
        changes = dict(self.shape_changes)
        if "hidden_size" in changes:
            heads = changes.get("num_attention_heads", values["num_attention_heads"])
            changes = {
                "head_dim": changes["hidden_size"] // heads,
                "lru_width": changes["hidden_size"],
                "intermediate_size": 6 * changes["hidden_size"],
                **changes,
            }
        return GriffinConfig(**{**values, **changes})
