"""Local calibration texts for mlx-lm's quantizers, which download theirs by default."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.reading import reason
from mlx_rgemma.io.text import read_documents
from mlx_rgemma.register import register

QUANTIZERS = ("dwq", "gptq", "dynamic_quant")

VALIDATION_FRACTION = 8
"""One of this many samples is for validation."""


def run_quantizer(name: str, arguments: Sequence[str], data_path: Path | None) -> None:
    """Run one of mlx-lm's quantizers with this package's model.

    Args:
        name: One of `QUANTIZERS`.
        arguments: Its command-line arguments.
        data_path: Calibration text, as for `read_documents`; None lets mlx-lm download its own.

    Raises:
        UserError: If the text cannot be read or is too short, or the quantizer refuses a value.
    """
    import importlib

    register()
    module: Any = importlib.import_module(f"mlx_lm.quant.{name}")
    original, argv = module.load_data, sys.argv
    if data_path is not None:
        if name == "dwq":
            module.load_data = _samples(data_path, _batch_size(arguments))
        else:
            module.load_data = _sequences(data_path)
    sys.argv = [f"mlx_rgemma.quantize {name}", *arguments]
    try:
        module.main()
    except UserError:
        raise
    except (AssertionError, ValueError) as error:
        raise UserError(f"mlx-lm's {name} stopped: {reason(error)}") from error
    finally:
        module.load_data, sys.argv = original, argv


def _sequences(path: Path) -> Callable[..., mx.array]:
    """Return `load_data` for gptq and dynamic_quant: sequences of one length, shuffled."""

    def load_data(tokenizer: Any, num_samples: int, sequence_length: int) -> mx.array:
        stream = [token for document in _tokenize(tokenizer, path) for token in document]
        length = min(sequence_length, len(stream))
        count = len(stream) // length
        sequences = mx.array(stream[: count * length]).reshape(count, length)
        order = mx.random.permutation(count)
        return sequences[order[:num_samples] if num_samples > 0 else order]

    return load_data


def _batch_size(arguments: Sequence[str]) -> int:
    """Return dwq's batch size, the minimum of its training and validation samples."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--batch-size", type=int, default=4)
    return max(parser.parse_known_args(arguments)[0].batch_size, 1)


def _samples(path: Path, batch_size: int) -> Callable[..., tuple[list[Any], list[Any]]]:
    """Return `load_data` for dwq: training and validation samples, each with its offset."""

    def load_data(
        tokenizer: Any,
        data_path: str,
        num_samples: int,
        max_seq_length: int,
        num_valid_samples: int = 32,
    ) -> tuple[list[Any], list[Any]]:
        samples = [
            (document[start : start + max_seq_length], 0)
            for document in _tokenize(tokenizer, path)
            for start in range(0, len(document), max_seq_length)
        ]
        order = np.random.permutation(len(samples))
        samples = [samples[i] for i in order if len(samples[i][0]) > 1]
        if len(samples) < 2 * batch_size:
            raise UserError(
                f"{path}: too short: it has {len(samples)} samples, and {2 * batch_size} are needed"
                " for training and validation; give more text, or a smaller --batch-size or"
                " --max-seq-length."
            )
        valid = max(min(num_valid_samples, len(samples) // VALIDATION_FRACTION), batch_size)
        return samples[valid:][:num_samples], samples[:valid]

    return load_data


def _tokenize(tokenizer: Any, path: Path) -> list[list[int]]:
    """Tokenize the documents of a file; each is between begin-of-text and end-of-text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = []
    for text in read_documents(path, tokenizer):
        tokens = [*tokenizer.encode(text), *([] if eos is None else [eos])]
        documents.append(tokens if bos is None or tokens[0] == bos else [bos, *tokens])
    return documents
