"""Checksums of tensors, kept in the metadata of a safetensors file.

The entry `crc32` of the metadata is a JSON object: the name of each tensor, and the CRC-32 of its
bytes in the file as 8 hexadecimal digits. Programs that do not know the entry ignore it. A CRC
detects damage (any single flipped bit), not forgery.

sums = {name: crc32(value) for name, value in arrays.items()}
mx.save_safetensors(path, arrays, {**metadata, CRC32: dump_checksums(sums)})

verify_file(path, read_header(path), metadata.get(CRC32))

A streaming writer does not know the checksums when it writes the header. All have the same length:
it writes `UNKNOWN` for each first, and overwrites the header at the end.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlx_rgemma.errors import CheckpointError, shown

if TYPE_CHECKING:
    import mlx.core as mx

CRC32 = "crc32"
"""Key of the metadata."""

UNKNOWN = "00000000"
"""Placeholder of the length of a checksum."""

CHUNK_BYTES = 1 << 20
DIGITS = re.compile(r"[0-9a-f]{8}")


class Stored(Protocol):
    """Place of a tensor in a file; `TensorInfo` is one."""

    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def crc32(value: mx.array) -> str:
    """Return the checksum of an array's bytes, as a safetensors file stores them."""
    import mlx.core as mx

    data = mx.contiguous(value.reshape(-1)).view(mx.uint8)
    return f"{zlib.crc32(memoryview(data)):08x}" if value.size else UNKNOWN  # type: ignore[arg-type]


def dump_checksums(checksums: Mapping[str, str]) -> str:
    """Return checksums as the text that is kept in the metadata."""
    return json.dumps(dict(sorted(checksums.items())), separators=(",", ":"))


def verify_file(path: Path, tensors: Mapping[str, Stored], text: str | None) -> None:
    """Verify the checksums of a file's tensors, reading a megabyte at a time.

    Args:
        path: The file.
        tensors: All its tensors, from its validated header.
        text: The entry `CRC32` of its metadata; None (no entry) passes.

    Raises:
        CheckpointError: If a tensor is damaged, the checksums are unreadable or of other tensors,
            or the file cannot be read.
    """
    if text is None:
        return
    expected = _parse(path, text)
    differing = sorted(expected.keys() ^ tensors.keys())
    if differing:
        raise CheckpointError(
            f"{path}: its checksums and its tensors do not match: only one of them has"
            f" {shown(differing[0])}; write or copy the file again."
        )
    try:
        with path.open("rb") as file:
            for name, tensor in tensors.items():
                file.seek(tensor.start)
                left, found = tensor.nbytes, 0
                while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                    found = zlib.crc32(chunk, found)
                    left -= len(chunk)
                if left or f"{found:08x}" != expected[name]:
                    raise CheckpointError(
                        f"{path}: {shown(name)} is damaged: its checksum is {found:08x},"
                        f" expected {expected[name]}; write or copy the file again."
                    )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _parse(path: Path, text: str) -> dict[str, str]:
    try:
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not all(
        isinstance(value, str) and DIGITS.fullmatch(value) for value in values.values()
    ):
        raise CheckpointError(
            f"{path}: its metadata has unreadable checksums ({CRC32} is {shown(text)});"
            " write or copy the file again."
        )
    return values
