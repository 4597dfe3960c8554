"""Reports of size and quality: of a model, of its quantizations, and of a conversion."""

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
from mlx_rgemma.checkpoints.formats.huggingface import CONFIG, CheckpointFolder
from mlx_rgemma.checkpoints.load import load
from mlx_rgemma.checkpoints.model_card import MODEL_CARD
from mlx_rgemma.checkpoints.schema import check_contents, expected_tensors
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation.perplexity import (
    Quality,
    Reference,
    TokenizedText,
    measure,
    tokenize_documents,
)
from mlx_rgemma.griffin.cache import state_nbytes
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.io.hub import Source, locate
from mlx_rgemma.io.markdown import markdown_table
from mlx_rgemma.tokenizers.load import has_tokenizer, load_tokenizer

PLAIN_DTYPE = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}


@dataclass(frozen=True)
class Size:
    """Size of a checkpoint.

    Attributes:
        file_bytes: Bytes of its weight files.
        weight_bytes: Bytes of its weights.
        state_bytes: Bytes of one sequence's state, in the dtype of the weights.
        parameters: Number of parameters.
    """

    file_bytes: int
    weight_bytes: int
    state_bytes: int
    parameters: int

    @classmethod
    def of(cls, folder: Path) -> Size:
        """Return the size of a checkpoint, from the headers of its files.

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
        """Mean bits per parameter."""
        return self.weight_bytes * 8 / self.parameters

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a decode step reads: all weights and the state."""
        return self.weight_bytes + self.state_bytes


def state_bytes(config: GriffinConfig, dtype: mx.Dtype) -> int:
    """Return the bytes of one sequence's state."""
    model = Model(config)
    model.set_dtype(dtype)  # lazy: nothing is computed
    return state_nbytes(model.make_cache())


@dataclass(frozen=True)
class Result:
    """One line of a report: a model, its size, and its quality on the text."""

    name: str
    size: Size
    quality: Quality

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
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
    text: TokenizedText,
    reference: Reference | None = None,
    **options: Any,
) -> Result:
    """Load a model, measure it, and free it.

    Args:
        name: Its name in the report.
        model: As for `load`.
        text: The text.
        reference: Predictions to compare with.
        **options: More arguments for `load`.

    Raises:
        CheckpointError: If the model cannot be loaded.
    """
    size = Size.of(locate(model, options.get("revision")).folder)
    loaded, _ = load(model, **options)
    quality = measure(loaded, text, reference)
    del loaded
    mx.clear_cache()
    return Result(name, size, quality)


def reference_of(model: str | Path | None, text: TokenizedText, **options: Any) -> Reference:
    """Load a model, compute its predictions, and free it.

    Raises:
        CheckpointError: If it cannot be loaded.
    """
    loaded, _ = load(model, **options)
    return Reference(loaded, text)


def sweep(
    source: Source,
    settings: Mapping[str, Mapping[str, Any]],
    text: TokenizedText,
    work: Path | None = None,
) -> tuple[list[Result], dict[str, str]]:
    """Convert a model with several settings and compare each with it.

    Args:
        source: The model.
        settings: Arguments of `convert`, by their name in the report.
        text: The text.
        work: Parent of the temporary folders, one at a time. Default: the system's.

    Returns:
        The results, and the reasons why other settings were skipped.
    """
    entries, skipped = [], {}
    reference = reference_of(source.folder, text)
    with tempfile.TemporaryDirectory(dir=work) as place:
        for name, options in settings.items():
            folder = Path(place) / "converted"
            try:
                convert(source.folder, folder, **options)
            except UserError as error:
                skipped[name] = str(error)
                continue
            entries.append(measure_folder(name, folder, text, reference))
            shutil.rmtree(folder)
    reference.close()
    return entries, skipped


def table(entries: Sequence[Result]) -> str:
    """Return a report as a Markdown table."""
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
    """Return a report as JSON: a list with one object per model."""
    return json.dumps([entry.as_dict() for entry in entries], indent=2)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


PLAIN = {
    "quantize": False,
    "q_bits": None,
    "q_group_size": None,
    "q_mode": "affine",
    "quant_predicate": None,
    "dequantize": False,
    "dtype": None,
}
"""Arguments of `convert` that keep the weights as they are."""

REPORT_FILE = "quality.json"


def check_reportable(options: Mapping[str, Any]) -> None:
    """Check before a conversion that there is a tokenizer for the report.

    Args:
        options: The arguments of `convert`.

    Raises:
        CheckpointError: If the source does not exist.
        UserError: If it is a folder without a tokenizer.
    """
    source = locate(options["hf_path"], options["revision"]).folder
    if (source / CONFIG).is_file() and not has_tokenizer(source):
        raise UserError(f"{source}: no tokenizer; --report needs one to read a text.")


def report_conversion(
    options: Mapping[str, Any], made: Path, documents: Sequence[str]
) -> list[Result]:
    """Compare a converted model with its source.

    The two are never in memory together. A source that cannot be loaded directly (Google's formats,
    an archive) is converted to a temporary folder beside the new one.

    Args:
        options: The arguments of `convert`.
        made: The new folder.
        documents: The text.

    Returns:
        The results of the source and of the new folder.

    Raises:
        CheckpointError: If there is no tokenizer, or the source can no longer be read.
    """
    text = tokenize_documents(load_tokenizer(made), documents)
    source = locate(options["hf_path"], options["revision"])
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".reference-") as work:
        original = source.folder
        if not (original / CONFIG).is_file():
            original = Path(work) / "original"
            convert(**{**options, **PLAIN, "mlx_path": original})
        model, _ = load(original)
        reference = Reference(model, text)
        first = Result(source.name, Size.of(original), measure(model, text, reference))
        del model
        mx.clear_cache()
        second = measure_folder(made.name, made, text, reference)
        reference.close()
    return [first, second]


def write_report(folder: Path, entries: Sequence[Result]) -> None:
    """Write a report into a folder: as JSON, and as a table in its model card."""
    (folder / REPORT_FILE).write_text(as_json(entries) + "\n", encoding="utf-8")
    tokens = entries[-1].quality.tokens
    with (folder / MODEL_CARD).open("a", encoding="utf-8") as card:
        card.write(
            f"\n## Quality\n\nOn a text of {tokens} tokens, compared with the source model:\n\n"
            f"{table(entries)}\n"
        )
