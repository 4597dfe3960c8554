"""Local texts for mlx-lm's quantizers, which would download theirs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.text import read_documents
from mlx_rgemma.register import register

QUANTIZERS = ("dwq", "gptq", "dynamic_quant")

VALIDATION_SHARE = 8
"""One of so many samples judges what was learned from the others."""


def run_quantizer(name: str, arguments: Sequence[str], data_path: Path | None) -> None:
    """Run one of mlx-lm's quantizers on this package's class.

    Args:
        name: One of `QUANTIZERS`.
        arguments: Its command line.
        data_path: The text to calibrate on, as for `read_documents`; None lets mlx-lm download its
            own.

    Raises:
        UserError: If the text cannot be read or is too short, or the quantizer refuses a value.
    """
    import importlib

    register()
    module: Any = importlib.import_module(f"mlx_lm.quant.{name}")
    theirs, before = module.load_data, sys.argv
    if data_path is not None:
        if name == "dwq":
            module.load_data = _samples(data_path, _batch_size(arguments))
        else:
            module.load_data = _rows(data_path)
    sys.argv = [f"mlx_rgemma.quantize {name}", *arguments]
    try:
        module.main()
    except UserError:
        raise
    except (AssertionError, ValueError) as error:
        raise UserError(f"mlx-lm's {name} stops: {error}") from error
    finally:
        module.load_data, sys.argv = theirs, before


def _rows(path: Path) -> Callable[..., mx.array]:
    """What gptq and dynamic_quant call: rows of equal length, in random order."""

    def load_data(tokenizer: Any, num_samples: int, sequence_length: int) -> mx.array:
        stream = [token for row in _encoded(tokenizer, path) for token in row]
        length = min(sequence_length, len(stream))
        count = len(stream) // length
        rows = mx.array(stream[: count * length]).reshape(count, length)
        order = mx.random.permutation(count)
        return rows[order[:num_samples] if num_samples > 0 else order]

    return load_data


def _batch_size(arguments: Sequence[str]) -> int:
    """What dwq will take for its batches, neither of its two sets of samples may be smaller."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--batch-size", type=int, default=4)
    return max(parser.parse_known_args(arguments)[0].batch_size, 1)


def _samples(path: Path, batch_size: int) -> Callable[..., tuple[list[Any], list[Any]]]:
    """What dwq calls: samples to learn from and to validate with, each with where it begins."""

    def load_data(
        tokenizer: Any,
        data_path: str,
        num_samples: int,
        max_seq_length: int,
        num_valid_samples: int = 32,
    ) -> tuple[list[Any], list[Any]]:
        pieces = [
            (row[start : start + max_seq_length], 0)
            for row in _encoded(tokenizer, path)
            for start in range(0, len(row), max_seq_length)
        ]
        pieces = [pieces[i] for i in np.random.permutation(len(pieces)) if len(pieces[i][0]) > 1]
        if len(pieces) < 2 * batch_size:
            raise UserError(
                f"{path}: too short: it makes {len(pieces)} samples, and {2 * batch_size} are"
                " needed to learn and to validate; give more text, or a smaller --batch-size or"
                " --max-seq-length."
            )
        share = min(num_valid_samples, len(pieces) // VALIDATION_SHARE)
        valid = max(share, batch_size)
        return pieces[valid:][:num_samples], pieces[:valid]

    return load_data


def _encoded(tokenizer: Any, path: Path) -> list[list[int]]:
    """Documents of a file in tokens, each between begin-of-text and end-of-text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = []
    for text in read_documents(path, tokenizer):
        tokens = [*tokenizer.encode(text), *([] if eos is None else [eos])]
        rows.append(tokens if bos is None or tokens[0] == bos else [bos, *tokens])
    return rows
