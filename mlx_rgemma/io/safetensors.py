"""Safetensors files: header validation, checksums, and a streaming writer.

A file is 8 bytes with the length of a JSON header, the header, and the concatenated tensors.

The header is parsed here and not by `safetensors.safe_open`, which accepts a header of 100 MB and a
name that occurs twice, and does not tell where a tensor lies, which checksums and shards need.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rgemma.errors import CheckpointError, shown
from mlx_rgemma.io.atomic import atomic_file
from mlx_rgemma.io.checksum import CRC32, UNKNOWN, crc32, dump_checksums, verify_file
from mlx_rgemma.io.reading import open_regular, reason

if TYPE_CHECKING:
    import mlx.core as mx

ITEM_SIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes per element of each dtype of the format."""

MLX_NAME = {
    "U8": "uint8",
    "U32": "uint32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
}
"""MLX's names of the dtypes in checkpoints of this architecture."""

MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 100_000
"""Limits of a header. The 9B model, quantized, has 1,186 tensors in 230 kB."""

MAX_DIMENSIONS = 16
METADATA = "__metadata__"
RECOVERY_HINT = "download or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """Entry of a header.

    Attributes:
        name: Name of the tensor.
        dtype: dtype in safetensors' spelling, for example "BF16".
        shape: Shape.
        file: The file.
        start: Offset of its bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path = Path()
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file by name, in the order of their offsets.

    The header is validated: each tensor has the bytes of its shape and dtype, the tensors are
    contiguous, and the last one ends at the end of the file.

    Raises:
        CheckpointError: If the file is missing, truncated, or not a safetensors file.
    """
    return _read(path)[0]


def verify_checksums(path: Path) -> None:
    """Verify the checksums of a file, if it has any.

    Raises:
        CheckpointError: If a tensor is damaged.
    """
    tensors, metadata = _read(path)
    verify_file(path, tensors, metadata.get(CRC32))


def _read(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return the tensors of a file and the metadata of its header."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(
                    f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull'."
                )
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated: {size} bytes, shorter than its own header;"
                    f" {RECOVERY_HINT}."
                )
            if length > MAX_HEADER_BYTES:
                raise _corrupt(
                    path, f"the header has {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    header = _parse(path, text)
    metadata = header.pop(METADATA, {})
    tensors = _tensors(path, header, 8 + length, size)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _corrupt(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a valid safetensors file: {what}; {RECOVERY_HINT}.")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > MAX_TENSORS:
            raise _corrupt(path, f"the header names more than {MAX_TENSORS:,} tensors")
        values = dict(pairs)
        if len(values) != len(pairs):
            raise _corrupt(path, "its header names a tensor twice")
        return values

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _corrupt(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return header


def _tensors(path: Path, header: dict[str, Any], data: int, size: int) -> dict[str, TensorInfo]:
    """Validate the header's entries against each other and the size of the file."""
    found = sorted(
        (_entry(path, name, value) for name, value in header.items()), key=lambda entry: entry[1:]
    )
    tensors, at = {}, 0
    for info, begin, end in found:
        if begin != at or end - begin != info.nbytes:
            raise _corrupt(path, f"{shown(info.name)} does not lie where its header says")
        at = end
        tensors[info.name] = TensorInfo(info.name, info.dtype, info.shape, path, data + begin)
    if data + at > size:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, its header says {data + at}; {RECOVERY_HINT}."
        )
    if data + at < size:
        raise _corrupt(path, f"{size - data - at} bytes after the last tensor")
    return tensors


def _entry(path: Path, name: str, value: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(value, dict):
        raise _corrupt(path, f"the entry of {shown(name)} is not an object")
    dtype = value.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise _corrupt(path, f"{shown(name)} has the unknown dtype {shown(dtype)}")
    shape, offsets = (_integers(value.get(key)) for key in ("shape", "data_offsets"))
    if shape is None or len(shape) > MAX_DIMENSIONS or offsets is None or len(offsets) != 2:
        raise _corrupt(path, f"{shown(name)} has no valid shape and offsets")
    return TensorInfo(name, dtype, shape), offsets[0], offsets[1]


def _integers(values: Any) -> tuple[int, ...] | None:
    if isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in values):
        return tuple(values)
    return None


def write_file(
    path: Path,
    tensors: Sequence[TensorInfo],
    values: Iterator[tuple[str, mx.array]],
    metadata: Mapping[str, str],
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write a safetensors file, one tensor at a time, and flush it to the disk.

    The metadata gets the checksums of the tensors; see `verify_checksums`.

    Args:
        path: The new file.
        tensors: Name, dtype and shape of each tensor, in order.
        values: Yields the name and value of each, in that order; one is in memory at a time.
        metadata: Texts for the header.
        advance: Receives the bytes of each written tensor, for a progress bar.

    Raises:
        ValueError: If a value does not match its entry in `tensors`.
    """
    import mlx.core as mx

    sums = {info.name: UNKNOWN for info in tensors}
    header: dict[str, Any] = {}
    at = 0
    for info in tensors:
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [at, at + info.nbytes],
        }
        at += info.nbytes

    def start() -> bytes:
        entries = {METADATA: {**metadata, CRC32: dump_checksums(sums)}, **header}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with path.open("xb") as file:
        file.write(start())
        for info in tensors:
            name, value = next(values)
            dtype = getattr(mx, MLX_NAME[info.dtype])
            if (name, value.dtype, value.shape) != (info.name, dtype, info.shape):
                raise ValueError(f"{name} {value.dtype} {value.shape} does not match {info}.")
            file.write(memoryview(mx.contiguous(value).view(mx.uint8)))  # type: ignore[arg-type]
            sums[name] = crc32(value)
            del value
            advance(info.nbytes)
        file.seek(0)
        file.write(start())  # same length
        file.flush()
        os.fsync(file.fileno())


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write arrays with checksums and metadata, atomically; an existing file is replaced.

    Raises:
        CheckpointError: If the file cannot be written; an existing file stays.
    """
    import mlx.core as mx

    checksums = dump_checksums({name: crc32(value) for name, value in arrays.items()})
    with atomic_file(path) as partial:
        mx.save_safetensors(str(partial), dict(arrays), {**metadata, CRC32: checksums})


def load_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the arrays and the metadata of a file after verifying its checksums.

    Arrays are lazy: they stay in the file until they are evaluated. A file without checksums is
    accepted.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    import mlx.core as mx

    infos = read_header(path)
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}).") from error
    arrays, metadata = loaded
    verify_file(path, infos, metadata.get(CRC32))
    return arrays, metadata
