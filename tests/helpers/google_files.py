"""Google's checkpoints for tests: where the golden ones are, and `.pt` files made by hand."""

from __future__ import annotations

import importlib.util
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
TORCH = GOLDEN / "tiny-2b-pytorch" / "tiny-2b.pt"
FLAX = {
    name: GOLDEN / "tiny-2b-flax" / name
    for name in ("orbax-0.12.8-ocdbt-params", "orbax-0.5.9-ocdbt", "orbax-0.5.9-zarr")
}
SAID: dict[str, Any] = {
    "attention_window_size": 16,
    "logits_soft_cap": 30.0,
    "embeddings_scale": True,
}
"""What the formats do not hold of tiny-2b: see its hparams.json."""

needs_tensorstore = pytest.mark.skipif(
    importlib.util.find_spec("tensorstore") is None,
    reason="Flax checkpoints need tensorstore (pip install '.[flax]')",
)

STORAGE = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage"}


def torch_entry(
    shape: tuple[int, ...], dtype: str, key: str, *, offset: Any = 0, strides: Any = None
) -> bytes:
    """The pickle of one tensor, as `torch.save` writes it."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    length = int(np.prod(shape))
    storage = b"(" + _value("storage") + b"ctorch\n" + STORAGE[dtype].encode() + b"\n"
    storage += _value(key) + _value("cpu") + _value(length) + b"tQ"
    fields = [offset, tuple(shape), tuple(strides), False]
    content = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    content += b"".join(_value(field) for field in fields)
    return content + b"ccollections\nOrderedDict\n)RtR"


def torch_pickle(entries: Mapping[str, bytes]) -> bytes:
    """The pickle of a dictionary of what is pickled already."""
    items = b"".join(_value(name) + entry + b"s" for name, entry in entries.items())
    return b"\x80\x02}" + items + b"."


def torch_zip(path: Path, content: bytes, storages: Iterable[tuple[str, Any]]) -> Path:
    """A `.pt` file of a pickle and the bytes of its storages, written one at a time."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages:
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as file:
                file.write(data)
        archive.writestr("archive/version", b"3\n")
    return path


def _value(value: Any) -> bytes:
    """The pickle of a plain value, without its frame and its end."""
    return pickle.dumps(value, protocol=2)[2:-1]


def tar_of(path: Path, *members: Path, name: str = "", mode: str = "w:gz") -> Path:
    """An archive of files and folders, all in a folder `name` if one is given."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member in members:
            archive.add(member, f"{name}/{member.name}" if name else member.name)
    return path


def flax_copy(name: str, target: Path) -> Path:
    """A Flax checkpoint that a test may change."""
    shutil.copytree(FLAX[name], target)
    return target
