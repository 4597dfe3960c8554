"""A converted model beside the one that it was made from: the report of `convert --report`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rgemma.checkpoints.convert import convert
from mlx_rgemma.checkpoints.formats.huggingface import CONFIG
from mlx_rgemma.checkpoints.load import load
from mlx_rgemma.checkpoints.model_card import MODEL_CARD
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation.perplexity import Reference, encode_rows, measure
from mlx_rgemma.evaluation.report import Result, Size, as_json, measure_folder, table
from mlx_rgemma.io.hub import locate
from mlx_rgemma.tokenizers.load import has_tokenizer, load_tokenizer

PLAIN = {
    "quantize": False,
    "q_bits": None,
    "q_group_size": None,
    "q_mode": "affine",
    "quant_predicate": None,
    "dequantize": False,
    "dtype": None,
}
"""Arguments of `convert` that change nothing."""

REPORT_FILE = "quality.json"


def check_reportable(options: Mapping[str, Any]) -> None:
    """See before a conversion that there will be a tokenizer to read a text with.

    Args:
        options: The arguments of `convert`.

    Raises:
        CheckpointError: If there is no such source.
        UserError: If it is a folder without a tokenizer.
    """
    source = locate(options["hf_path"], options["revision"]).folder
    if (source / CONFIG).is_file() and not has_tokenizer(source):
        raise UserError(f"{source}: no tokenizer, and without one --report can read no text.")


def report_conversion(
    options: Mapping[str, Any], made: Path, documents: Sequence[str]
) -> list[Result]:
    """Measure a new folder against its source.

    The two are never in memory together. A source that no model can be loaded from as it is
    (Google's formats, an archive) is converted for the time of the report, beside the new folder.

    Args:
        options: The arguments of `convert` that made it.
        made: The new folder.
        documents: The text.

    Returns:
        An entry for the source and one for the new folder.

    Raises:
        CheckpointError: If there is no tokenizer, or the source cannot be read any more.
    """
    rows = encode_rows(load_tokenizer(made), documents)
    source = locate(options["hf_path"], options["revision"])
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".reference-") as work:
        original = source.folder
        if not (original / CONFIG).is_file():
            original = Path(work) / "original"
            convert(**{**options, **PLAIN, "mlx_path": original})
        model, _ = load(original)
        reference = Reference(model, rows)
        first = Result(source.name, Size.of(original), measure(model, rows, reference))
        del model
        mx.clear_cache()
        second = measure_folder(made.name, made, rows, reference)
        reference.close()
    return [first, second]


def write_report(folder: Path, entries: Sequence[Result]) -> None:
    """Keep a report in a folder: as JSON, and as a table in its model card."""
    (folder / REPORT_FILE).write_text(as_json(entries) + "\n", encoding="utf-8")
    tokens = entries[-1].quality.tokens
    with (folder / MODEL_CARD).open("a", encoding="utf-8") as card:
        card.write(
            f"\n## Quality\n\nOn a text of {tokens} tokens, beside the model that it was made"
            f" from:\n\n{table(entries)}\n"
        )
