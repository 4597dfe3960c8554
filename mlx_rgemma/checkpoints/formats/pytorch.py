"""PyTorch checkpoints, read without PyTorch and without unpickling.

A `.pt` file is an uncompressed zip archive: `data.pkl` describes the tensors, `data/<key>` holds
the bytes of a storage. Unpickling can call any importable function; `torch_pickle` interprets the
pickle instead.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_rgemma.checkpoints.formats.torch_pickle import ForbiddenName, Storage, Tensor, read_pickle
from mlx_rgemma.errors import CheckpointError, shown
from mlx_rgemma.io.reading import open_regular, reason
from mlx_rgemma.io.safetensors import ITEM_SIZE, MAX_DIMENSIONS, RECOVERY_HINT, TensorInfo

BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
"""Unsigned integers of the size of each dtype of weights."""

MAX_PICKLE_BYTES = 4_000_000
MAX_SIZE = 1 << 48
"""Limit of sizes, strides and offsets, in elements."""

READ_TOGETHER = 1 << 22
"""Bytes read at once; the size of a directory of 50,000 entries."""

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
LOCAL_MAGIC = b"PK\x03\x04"


class _LimitedReader:
    """File that limits each read to `READ_TOGETHER` bytes: zipfile reads a whole directory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        maximum = READ_TOGETHER + 1
        data = self._file.read(maximum if size < 0 else min(size, maximum))
        if len(data) == maximum:
            raise ValueError(f"its directory has more than {READ_TOGETHER:,} bytes")
        return data


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive with a directory of bounded size.

    Raises:
        CheckpointError: If the file is missing or not a regular file.
        ValueError: If its directory is too large. zipfile raises other types for damaged files.
    """
    with open_regular(path) as file, zipfile.ZipFile(_LimitedReader(file)) as archive:
        yield archive


class TorchFile:
    """Tensors of a `.pt` file, read on demand.

    Attributes:
        path: The file.
        tensors: Name, dtype and shape of each.
    """

    transposed_kernels = False

    def __init__(self, path: Path) -> None:
        """Read the file's directory and its pickle.

        Raises:
            CheckpointError: If the file is damaged, or its pickle holds anything but tensors.
        """
        self.path = path
        self._checked: set[str] = set()
        self._guarded(self._open)
        self.tensors = {
            name: TensorInfo(name, tensor.storage.dtype, tensor.shape, path)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, part: int | None = None) -> np.ndarray[Any, Any]:
        """Return a tensor, or one index of its first axis.

        Returns:
            The bits, as integers of the size of the dtype; a memory map.

        Raises:
            CheckpointError: If the checksum of its storage is wrong.
        """
        return self._guarded(lambda: self._read(name, part))

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the file, and turn errors into one line."""
        try:
            return work()
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror or error})."
            ) from error
        except ForbiddenName as error:
            raise CheckpointError(
                f"{self.path}: its pickle names {error}; only tensors and dictionaries of tensors"
                " are read, nothing else is loaded or run."
            ) from error
        except Exception as error:  # zipfile and pickletools raise many types for damaged files
            raise self._damaged(reason(error)) from error

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid PyTorch file: {what}; {RECOVERY_HINT}.")

    def _open(self) -> None:
        with open_zip(self.path) as archive:
            self._size = self.path.stat().st_size
            entries = archive.infolist()
            self._entries = {entry.filename: entry for entry in entries}
            if len(self._entries) != len(entries):
                raise self._damaged("two entries of one name")
            pickles = [n for n in self._entries if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise self._damaged("it holds no data.pkl" if not pickles else "several data.pkl")
            self._prefix = pickles[0].removesuffix("data.pkl")
            for name in self._entries:
                self._check_entry(name)
            order = self._prefix + "byteorder"
            if order in self._entries and self._entries[order].file_size > 16:
                raise self._damaged("byteorder is too large")
            if order in self._entries and archive.read(order).strip() != b"little":
                raise CheckpointError(f"{self.path}: written on a big-endian machine.")
            if self._entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise self._damaged(f"data.pkl has more than {MAX_PICKLE_BYTES:,} bytes")
            content = archive.read(pickles[0])
        values = read_pickle(content)
        if not isinstance(values, dict) or not values:
            raise CheckpointError(f"{self.path}: not a dictionary of tensors.")
        self._tensors = {name: self._tensor(name, value) for name, value in values.items()}

    def _check_entry(self, name: str) -> None:
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise self._damaged(f"{shown(name)} is compressed or encrypted")
        if entry.file_size != entry.compress_size or entry.file_size > self._size:
            raise self._damaged(f"{shown(name)} is larger than its place in the file")

    def _tensor(self, name: str, value: Any) -> Tensor:
        """Validate the pickle's description of a tensor against its storage."""
        label = shown(name)
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{self.path}: {label} is a {type(value).__name__}, expected a tensor."
            )
        storage, shape, strides = value.storage, value.shape, value.strides
        if not isinstance(storage, Storage) or not _sizes(shape) or not _sizes(strides):
            raise self._damaged(f"{label} has no valid storage and shape")
        if len(shape) != len(strides) or not _is_size(value.offset):
            raise self._damaged(f"{label} has no valid strides and offset")
        entry = self._entries.get(f"{self._prefix}data/{storage.key}")
        if entry is None:
            raise self._damaged(f"the storage of {label} is missing")
        if entry.file_size != storage.length * ITEM_SIZE[storage.dtype]:
            raise self._damaged(f"the storage of {label} has {entry.file_size} bytes")
        count = math.prod(shape)
        last = value.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if count == 0 or count > storage.length or last >= storage.length:
            raise self._damaged(f"{label} does not lie in its storage")
        return value

    def _read(self, name: str, part: int | None) -> np.ndarray[Any, Any]:
        tensor = self._tensors[name]
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        start = tensor.offset
        if part is not None:
            start += part * strides[0]
            shape, strides = shape[1:], strides[1:]
        entry = self._entries[f"{self._prefix}data/{storage.key}"]
        begin = self._begin(entry)
        if storage.key not in self._checked:
            self._check_sum(entry)
            self._checked.add(storage.key)
        kind = np.dtype(BITS[storage.dtype])
        length = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        at = begin + start * kind.itemsize
        flat = np.memmap(self.path, kind.newbyteorder("<"), "r", at, (length,))
        steps = tuple(s * kind.itemsize for s in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

    def _begin(self, entry: zipfile.ZipInfo) -> int:
        """Return the offset of an entry's bytes, after its local header, which is checked."""
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            header = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        begin = entry.header_offset + LOCAL_HEADER.size + header[-2] + header[-1]
        if header[0] != LOCAL_MAGIC or begin + entry.file_size > self._size:
            raise self._damaged(f"{shown(entry.filename)} is not where the directory says")
        return begin

    def _check_sum(self, entry: zipfile.ZipInfo) -> None:
        """Verify the CRC-32 of a storage, which zipfile does at the end of reading."""
        with open_zip(self.path) as archive, archive.open(entry) as file:
            while file.read(READ_TOGETHER):
                pass


def _sizes(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= MAX_DIMENSIONS
        and all(_is_size(value) for value in values)
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIZE
