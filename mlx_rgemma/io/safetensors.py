"""Safetensors files: their headers checked before anything is read, and written as a stream.

A file is 8 bytes with the length of a JSON header, the header, and the tensors' bytes end to end.
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
from mlx_rgemma.io.checksum import CRC32, UNKNOWN, crc32, dump_checksums, verify_file
from mlx_rgemma.io.reading import open_regular

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
"""Bytes of one element of each dtype that a header can name."""

MLX_NAME = {
    "U8": "uint8",
    "U32": "uint32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
}
"""What MLX calls the dtypes that checkpoints of this architecture hold."""

MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 100_000
"""Limits of a header. The 9B model, quantized, has 1,186 tensors in 230 kB."""

MAX_DIMENSIONS = 16
METADATA = "__metadata__"
RECOVERY_HINT = "download or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        name: Its name.
        dtype: In safetensors' spelling, for example "BF16".
        shape: Its shape.
        file: The file that holds it.
        start: Where in the file its bytes begin.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path = Path()
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def check_file(path: str | Path) -> None:
    """Refuse a file that is missing, truncated or no safetensors file.

    Raises:
        CheckpointError: Naming the file and what is wrong with it.
    """
    read_header(Path(path))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name, in the order of their bytes.

    Everything is checked that can be without reading the tensors: that the header is one, that
    each tensor has as many bytes as its shape says, that they lie end to end, and that the last
    one ends where the file does.

    Raises:
        CheckpointError: Naming the file and what is wrong with it.
    """
    return _read(path)[0]


def verify_checksums(path: Path) -> None:
    """Compare the tensors of a file with the checksums that it was written with, if it has any.

    Raises:
        CheckpointError: If they differ.
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
                raise _damaged(
                    path, f"the header has {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    header = _parse(path, text)
    metadata = header.pop(METADATA, {})
    tensors = _tensors(path, header, 8 + length, size)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a sound safetensors file: {what}; {RECOVERY_HINT}.")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > MAX_TENSORS:
            raise _damaged(path, f"the header names more than {MAX_TENSORS:,} tensors")
        values = dict(pairs)
        if len(values) != len(pairs):
            raise _damaged(path, "its header names a tensor twice")
        return values

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _tensors(path: Path, header: dict[str, Any], data: int, size: int) -> dict[str, TensorInfo]:
    """The header's entries, checked against each other and the size of the file."""
    found = sorted(
        (_entry(path, name, value) for name, value in header.items()), key=lambda entry: entry[1:]
    )
    tensors, at = {}, 0
    for info, begin, end in found:
        if begin != at or end - begin != info.nbytes:
            raise _damaged(path, f"{shown(info.name)} does not lie where its header says")
        at = end
        tensors[info.name] = TensorInfo(info.name, info.dtype, info.shape, path, data + begin)
    if data + at > size:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, its header promises {data + at}; {RECOVERY_HINT}."
        )
    if data + at < size:
        raise _damaged(path, f"{size - data - at} bytes after the last tensor")
    return tensors


def _entry(path: Path, name: str, value: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(value, dict):
        raise _damaged(path, f"the entry of {shown(name)} is not an object")
    dtype = value.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise _damaged(path, f"{shown(name)} has the unknown dtype {shown(dtype)}")
    shape, offsets = (_whole_numbers(value.get(key)) for key in ("shape", "data_offsets"))
    if shape is None or len(shape) > MAX_DIMENSIONS or offsets is None or len(offsets) != 2:
        raise _damaged(path, f"{shown(name)} has no proper shape and place")
    return TensorInfo(name, dtype, shape), offsets[0], offsets[1]


def _whole_numbers(values: Any) -> tuple[int, ...] | None:
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
    """Write a safetensors file, one tensor at a time, and see that it reaches the disk.

    The metadata gets the checksums of the tensors; see `verify_checksums`.

    Args:
        path: The new file.
        tensors: Name, dtype and shape of each tensor, in order.
        values: Yields the name and value of each, in that order; only one is held at a time.
        metadata: Texts for the header.
        advance: Told the bytes of each tensor when they are written.

    Raises:
        ValueError: If a value is not the tensor that was announced.
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
                raise ValueError(f"{info} was announced, not {name} {value.dtype} {value.shape}.")
            file.write(memoryview(mx.contiguous(value).view(mx.uint8)))  # type: ignore[arg-type]
            sums[name] = crc32(value)
            del value
            advance(info.nbytes)
        file.seek(0)
        file.write(start())  # of the same length
        file.flush()
        os.fsync(file.fileno())
