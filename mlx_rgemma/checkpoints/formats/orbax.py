"""Flax checkpoints of Orbax (OCDBT, or a zarr folder per array), read without JAX.

They are read with tensorstore: `pip install ".[flax]"` in a clone.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rgemma.checkpoints.formats.detect import ARRAY
from mlx_rgemma.checkpoints.formats.pytorch import BITS
from mlx_rgemma.errors import CheckpointError, shortened
from mlx_rgemma.io.reading import read_json, reason
from mlx_rgemma.io.safetensors import RECOVERY_HINT, TensorInfo

MANIFEST = "manifest.ocdbt"
METADATA = "_METADATA"
OUTER = "params."
"""Outer level of some parameter trees."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MAX_FILES = 100_000
MAX_ARRAYS = 20_000
MAX_ARRAY_JSON_BYTES = 100_000
LIST_SECONDS = 60
CACHE_BYTES = 1 << 33
READ_TOGETHER = 1 << 27
DETAILS = re.compile(r"\s*\[(source locations|tensorstore_spec)=.*", re.DOTALL)


class OrbaxFolder:
    """Arrays of an Orbax checkpoint, read on demand.

    Attributes:
        path: The folder.
        tensors: Name, dtype and shape of each, without the outer `params` level.
    """

    transposed_kernels = True

    def __init__(self, path: Path) -> None:
        """Read the metadata of all arrays.

        Raises:
            CheckpointError: If tensorstore is missing, or the checkpoint is damaged.
        """
        self._tensorstore = _import(path)
        self.path = path
        _check_files(path)
        names = self._names()
        if not names:
            raise CheckpointError(f"{path}: no arrays in it; {RECOVERY_HINT}.")
        self._compare_with_list(names)
        outer = OUTER if all(name.startswith(OUTER) for name in names) else ""
        self._stored = {name.removeprefix(outer): name for name in names}
        self.tensors = {name: self._describe(name) for name in self._stored}

    def read(self, name: str, part: int | None = None) -> np.ndarray[Any, Any]:
        """Read an array, or one index of its first axis.

        Returns:
            The bits, as integers of the size of the dtype.

        Raises:
            CheckpointError: If a chunk is missing or damaged.
        """
        kind = BITS[self.tensors[name].dtype]
        try:
            array = self._open(self._stored[name])
            array = array if part is None else array[part]
            result = np.empty(array.shape, array.dtype.numpy_dtype)
            # Copy in parts: the cache holds the chunks of this array.
            rows = max(1, READ_TOGETHER // max(1, result[:1].nbytes))
            ends = range(rows, len(result) + rows, rows)
            for start, end in ((end - rows, min(end, len(result))) for end in ends):
                result[start:end] = array[start:end].read().result()
        except Exception as error:  # tensorstore raises many types
            raise self._damaged(f"{name} cannot be read", error) from error
        return result.view(kind)

    def _names(self) -> list[str]:
        if (self.path / MANIFEST).is_file():
            try:
                store = self._tensorstore.KvStore.open(self._store("")).result()
                keys = [key.decode("utf-8") for key in store.list().result(timeout=LIST_SECONDS)]
            except Exception as error:
                raise self._damaged("its database cannot be read", error) from error
            names = [key.removesuffix(f"/{ARRAY}") for key in keys if key.endswith(f"/{ARRAY}")]
        else:
            files = [p for p in self.path.glob(f"*/{ARRAY}") if p.is_file()]
            for file in files:
                read_json(file, MAX_ARRAY_JSON_BYTES)
            names = [file.parent.name for file in files]
        if len(names) > MAX_ARRAYS:
            raise CheckpointError(
                f"{self.path}: {len(names):,} arrays, expected up to {MAX_ARRAYS:,}."
            )
        return sorted(names)

    def _compare_with_list(self, names: list[str]) -> None:
        """Compare the arrays with Orbax's list of the tree, if there is one."""
        path = self.path / METADATA
        if not path.is_file():
            return
        tree = read_json(path).get("tree_metadata")
        try:
            listed = {
                ".".join(level["key"] for level in entry["key_metadata"])
                for entry in dict(tree).values()  # type: ignore[arg-type]
            }
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: not a list of parameters; {RECOVERY_HINT}.") from error
        absent = sorted(listed - set(names))
        if absent:
            raise CheckpointError(
                f"{self.path}: {len(absent)} of {len(listed)} arrays missing: {shortened(absent)};"
                f" {RECOVERY_HINT}."
            )

    def _describe(self, name: str) -> TensorInfo:
        try:
            array = self._open(self._stored[name])
        except Exception as error:
            raise self._damaged(f"{name} cannot be opened", error) from error
        chunks = array.chunk_layout.read_chunk.shape or ()
        if any(n % chunk for n, chunk in zip(array.shape, chunks, strict=True)):
            # Orbax writes shards of one size.
            raise CheckpointError(
                f"{self.path}: {name} is {list(array.shape)}, not a multiple of its chunks"
                f" {list(chunks)}; {RECOVERY_HINT}."
            )
        dtype = DTYPES.get(array.dtype.name, array.dtype.name)
        return TensorInfo(name, dtype, tuple(array.shape), self.path)

    def _open(self, stored: str) -> Any:
        context = {"cache_pool": {"total_bytes_limit": CACHE_BYTES}}
        return self._tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": self._store(f"{stored}/"),
                "fill_missing_data_reads": False,
            },
            open=True,
            read=True,
            context=self._tensorstore.Context(context),
        ).result()

    def _store(self, path: str) -> dict[str, Any]:
        folder = f"{self.path.resolve()}/"
        if not (self.path / MANIFEST).is_file():
            return {"driver": "file", "path": folder + path}
        base = {"driver": "file", "path": folder}
        return {"driver": "ocdbt", "base": base, "path": path}

    def _damaged(self, what: str, error: Exception) -> CheckpointError:
        why = reason(ValueError(DETAILS.sub("", str(error)) or type(error).__name__))
        return CheckpointError(f"{self.path}: {what} ({why}); {RECOVERY_HINT}.")


def _check_files(path: Path) -> None:
    """Refuse links out of a folder, devices and pipes, and too many files.

    In the cache of the Hugging Face Hub, files are links to blobs of the same repository.
    """
    root = path.resolve()
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    if snapshots is not None and snapshots.parent.name.startswith("models--"):
        root = snapshots.parent
    count = 0
    for folder, folders, files in os.walk(path):
        count += len(folders) + len(files)
        if count > MAX_FILES:
            raise CheckpointError(
                f"{path}: more than {MAX_FILES:,} files, no checkpoint needs them."
            )
        for name in (*folders, *files):
            entry = Path(folder, name)
            # Not `resolve`, which raises where links lead in a circle.
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(root):
                raise CheckpointError(f"{entry}: a link out of {path}; this is refused.")
            if not entry.is_dir() and not entry.is_file():
                raise CheckpointError(f"{entry}: not a regular file; this is refused.")


def _import(path: Path) -> Any:
    try:
        return importlib.import_module("tensorstore")
    except ImportError:
        raise CheckpointError(
            f"{path}: reading Flax checkpoints needs tensorstore: pip install '.[flax]' in a clone."
        ) from None
