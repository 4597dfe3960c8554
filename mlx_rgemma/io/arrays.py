"""Named arrays as a safetensors file: written atomically, verified when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.atomic import atomic_file
from mlx_rgemma.io.checksum import CRC32, crc32, dump_checksums, verify_file
from mlx_rgemma.io.safetensors import read_header


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write arrays, their checksums and metadata over the file before, in one step.

    Raises:
        CheckpointError: If the file cannot be written; the one that was there stays.
    """
    checksums = dump_checksums({name: crc32(value) for name, value in arrays.items()})
    with atomic_file(path) as partial:
        mx.save_safetensors(str(partial), dict(arrays), {**metadata, CRC32: checksums})


def load_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the arrays and the metadata of a file, once its checksums are verified.

    Arrays stay in the file until they are used. A file without checksums is accepted.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    infos = read_header(path)
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read ({reason}).") from error
    arrays, metadata = loaded
    verify_file(path, infos, metadata.get(CRC32))
    return arrays, metadata
