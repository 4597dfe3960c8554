"""What a model costs and what it is worth, beside the model that it was made from."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rgemma.checkpoints.convert import convert
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.load import load
from mlx_rgemma.checkpoints.schema import check_contents, expected_tensors
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation.perplexity import Quality, Reference, Rows, measure
from mlx_rgemma.griffin.cache import state_nbytes
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.io.hub import Source, locate
from mlx_rgemma.io.markdown import markdown_table

PLAIN_DTYPE = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}


@dataclass(frozen=True)
class Size:
    """What a checkpoint takes.

    Attributes:
        file_bytes: Its weight files, on disk.
        weight_bytes: Its weights.
        state_bytes: The state of one sequence, in the dtype of the weights.
        parameters: Number of the model's parameters.
    """

    file_bytes: int
    weight_bytes: int
    state_bytes: int
    parameters: int

    @classmethod
    def of(cls, folder: Path) -> Size:
        """The size of a checkpoint, by the headers of its files.

        Raises:
            CheckpointError: If it is incomplete or damaged.
        """
        opened = CheckpointFolder.open(folder)
        redundant = check_contents(opened).redundant
        tensors = [info for name, info in opened.tensors.items() if name not in redundant]
        dtype = PLAIN_DTYPE[opened.tensors["model.final_norm.weight"].dtype]
        return cls(
            sum(file.stat().st_size for file in opened.files),
            sum(info.nbytes for info in tensors),
            state_bytes(opened.config, dtype),
            sum(wanted.size for wanted in expected_tensors(opened.config)),
        )

    @property
    def bits_per_weight(self) -> float:
        """Bits that a parameter takes on average."""
        return self.weight_bytes * 8 / self.parameters

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a decode step must read: every weight once, and the state."""
        return self.weight_bytes + self.state_bytes


def state_bytes(config: GriffinConfig, dtype: mx.Dtype) -> int:
    """Size of the state of one sequence."""
    model = Model(config)
    model.set_dtype(dtype)  # nothing is computed: only dtypes are asked for
    return state_nbytes(model.make_cache())


@dataclass(frozen=True)
class Result:
    """One line of a report: a model, what it takes, and what it makes of the text."""

    name: str
    size: Size
    quality: Quality

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.name,
            "bits_per_weight": round(self.size.bits_per_weight, 3),
            "file_bytes": self.size.file_bytes,
            "bytes_per_token": self.size.bytes_per_token,
            "state_bytes": self.size.state_bytes,
            **self.quality.as_dict(),
        }


def measure_folder(
    name: str,
    model: str | Path | None,
    rows: Rows,
    reference: Reference | None = None,
    **options: Any,
) -> Result:
    """Load a model, measure it, and let go of it again.

    Args:
        name: What the report calls it.
        model: As for `load`.
        rows: The text.
        reference: What to compare with.
        **options: More arguments for `load`.

    Raises:
        CheckpointError: If the model cannot be loaded.
    """
    size = Size.of(locate(model, options.get("revision")).folder)
    loaded, _ = load(model, **options)
    quality = measure(loaded, rows, reference)
    del loaded
    mx.clear_cache()
    return Result(name, size, quality)


def reference_of(model: str | Path | None, rows: Rows, **options: Any) -> Reference:
    """The predictions of a model, which is let go of.

    Raises:
        CheckpointError: If it cannot be loaded.
    """
    loaded, _ = load(model, **options)
    return Reference(loaded, rows)


def sweep(
    source: Source,
    settings: Mapping[str, Mapping[str, Any]],
    rows: Rows,
    work: Path | None = None,
) -> tuple[list[Result], dict[str, str]]:
    """Convert a model in several ways and measure each against it.

    Args:
        source: The model.
        settings: Arguments of `convert`, by the name that the report has for them.
        rows: The text.
        work: Where the temporary folders go, one at a time; by default the system's place.

    Returns:
        What was measured, and why the rest of the settings could not be.
    """
    entries, skipped = [], {}
    reference = reference_of(source.folder, rows)
    with tempfile.TemporaryDirectory(dir=work) as place:
        for name, options in settings.items():
            folder = Path(place) / "converted"
            try:
                convert(source.folder, folder, **options)
            except UserError as error:
                skipped[name] = str(error)
                continue
            entries.append(measure_folder(name, folder, rows, reference))
            shutil.rmtree(folder)
    reference.close()
    return entries, skipped


def table(entries: Sequence[Result]) -> str:
    """Return a report as a table in Markdown."""
    compared = any(entry.quality.mean_kl is not None for entry in entries)
    titles = ["model", "bits per weight", "on disk", "read per token", "perplexity"]
    titles += ["mean KL", "same top token"] if compared else []
    rows = []
    for entry in entries:
        size, q = entry.size, entry.quality
        cells = [
            entry.name,
            f"{size.bits_per_weight:.2f}",
            _megabytes(size.file_bytes),
            _megabytes(size.bytes_per_token),
            f"{q.perplexity:.3f} ± {q.standard_error:.3f}",
        ]
        if compared:
            cells += ["" if q.mean_kl is None else f"{q.mean_kl:.5f}"]
            cells += ["" if q.top1_agreement is None else f"{q.top1_agreement:.2%}"]
        rows.append(cells)
    return markdown_table(titles, rows)


def as_json(entries: Sequence[Result]) -> str:
    """A report as JSON: a list with one object a model."""
    return json.dumps([entry.as_dict() for entry in entries], indent=2)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
