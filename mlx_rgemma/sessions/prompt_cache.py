"""Save and load states in mlx-lm's prompt-cache format, checked against the model.

A file is recognized by its content, not its name. All of it is checked before use: the length of
the header, the shapes and dtypes of the tensors, their checksums and all counters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_rgemma import distributed
from mlx_rgemma.errors import CheckpointError, UserError, shown
from mlx_rgemma.griffin.cache import AttentionCache, GriffinCache, RecurrentCache
from mlx_rgemma.griffin.checks import refuse_forked_process
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.griffin.sharding import gather_state, split_state
from mlx_rgemma.io.atomic import atomic_file
from mlx_rgemma.io.checksum import CRC32, crc32, dump_checksums, verify_file
from mlx_rgemma.io.safetensors import TensorInfo, read_header
from mlx_rgemma.ops.streams import synchronize_streams

FINGERPRINT = "fingerprint"
PENDING = "pending_token"
"""Metadata key of the pending token of a session: seen, but not read yet."""

SUFFIX = ".safetensors"
MAX_METADATA_BYTES = 2_000_000
MAX_HEADER_BYTES = 4_000_000
"""Largest header of a state file: enough for the metadata and all tensor names."""

CACHE_CLASSES = {kind.__name__: kind for kind in (RecurrentCache, AttentionCache)}


def fingerprint(model: Model) -> str:
    """Return a short hash of a model's sizes, window rule and norm weights.

    Norm weights are not quantized. They are rounded to bfloat16, so that a checkpoint has the same
    fingerprint in every precision.
    """
    c = model.args
    shape = (
        c.vocab_size,
        c.hidden_size,
        c.intermediate_size,
        c.lru_width,
        c.num_attention_heads,
        c.head_dim,
        c.conv1d_width,
        c.past_window,
        c.layer_types,
    )
    digest = hashlib.sha256(repr(shape).encode())
    norms = [layer.temporal_pre_norm.weight for layer in model.layers]
    norms.append(model.model.final_norm.weight)
    rounded = mx.stack(norms).astype(mx.bfloat16).view(mx.uint16)
    digest.update(np.array(rounded).tobytes())
    return digest.hexdigest()[:32]


def save_prompt_cache(
    path: str | Path,
    model: Model,
    cache: list[GriffinCache],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a state as a safetensors file that `load_prompt_cache` (and mlx-lm) reads.

    The file is written atomically. If a model is sharded, all ranks must call this, and rank 0
    writes the whole state.

    Args:
        path: The file, with any name; an existing one is replaced.
        model: The model of the state.
        cache: The state.
        metadata: Strings to save with it.

    Raises:
        CheckpointError: If the file cannot be written; an existing one is kept.
        UserError: If the metadata are not strings, or too long.
    """
    refuse_forked_process()
    if model.group is None:
        return _write(Path(path), model, cache, metadata)
    synchronize_streams()
    whole = gather_state(cache, model.group)
    mx.eval([layer.state for layer in whole])
    distributed.run_on_rank0(lambda: _write(Path(path), model, whole, metadata), model.group)


def _write(
    path: Path, model: Model, cache: list[GriffinCache], metadata: Mapping[str, str] | None
) -> None:
    arrays: Any = dict(tree_flatten([layer.state for layer in cache]))
    mx.eval(arrays)
    checksums = {name: crc32(value) for name, value in arrays.items()}
    texts = {**_checked(metadata or {}), FINGERPRINT: fingerprint(model)}
    texts[CRC32] = dump_checksums(checksums)
    # mlx-lm expects metadata, the classes of the caches, and an empty list of scalars.
    header: Any = dict(tree_flatten([texts, [type(layer).__name__ for layer in cache], [""]]))
    with atomic_file(path, SUFFIX) as partial:
        mx.save_safetensors(str(partial), arrays, header)


def _checked(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """Refuse metadata that `load_prompt_cache` would refuse."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(f"metadata: {shown(key)} is {shown(value)}, expected a string.")
    nbytes = len(json.dumps(dict(metadata)))
    if nbytes > MAX_METADATA_BYTES:
        raise UserError(f"metadata: {nbytes} bytes, expected at most {MAX_METADATA_BYTES}.")
    return metadata


def load_prompt_cache(path: str | Path, model: Model) -> list[GriffinCache]:
    """Load a state and check that it belongs to the model.

    Args:
        path: A file that `save_prompt_cache`, `Session.save` or mlx-lm wrote.
        model: The model that continues from it.

    Raises:
        CheckpointError: If the file is missing, damaged, or of another model, window or shape.
    """
    cache, metadata = read_prompt_cache(path, model)
    pending = pending_token(path, model, metadata)
    if pending is not None:
        model.prefill(mx.array([[pending]]), cache)
        mx.eval([layer.state for layer in cache])
    return cache


def read_prompt_cache(path: str | Path, model: Model) -> tuple[list[GriffinCache], dict[str, str]]:
    """Load a state without reading its pending token, and its metadata.

    If a model is sharded, all ranks must call this; rank 0 reads the file.

    Raises:
        CheckpointError: If the file is missing, damaged, or of another model, window or shape.
    """
    refuse_forked_process()
    group = model.group
    if group is None:
        return _read(Path(path), model)
    whole: list[GriffinCache] = []

    def read() -> dict[str, str]:
        cache, metadata = _read(Path(path), model)
        whole.extend(cache)
        return metadata

    metadata = distributed.run_on_rank0(read, group)
    arrays = distributed.broadcast([a for layer in whole for a in layer.state], group)
    states = [arrays[i : i + 3] for i in range(0, len(arrays), 3)]
    kinds = [type(layer) for layer in model.make_cache()]
    cache = [kind.from_state(state) for kind, state in zip(kinds, states, strict=True)]
    return split_state(cache, group.rank(), group.size()), metadata


def find_state(path: str | Path) -> Path:
    """Return the file of a saved state: `path`, or `path` with the suffix that mlx-lm appends."""
    path = Path(path)
    appended = Path(f"{path}{SUFFIX}")
    # os.path returns False for names that are too long; pathlib raises.
    return appended if os.path.isfile(appended) and not os.path.exists(path) else path


def _read(path: Path, model: Model) -> tuple[list[GriffinCache], dict[str, str]]:
    path = find_state(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path}: a folder, device or pipe, expected a saved state.")
    tensors = _read_tensors(path)
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except Exception as error:  # MLX raises many kinds of errors on foreign files
        raise _foreign(path, f"{type(error).__name__}: {shown(str(error))}") from error
    arrays, header = loaded
    metadata = {key[2:]: text for key, text in header.items() if key.startswith("0.")}
    verify_file(path, tensors, metadata.pop(CRC32, None))
    cache = _caches(path, arrays, header)
    try:
        size = 1 if model.group is None else model.group.size()
        model.check_cache(split_state(cache, 0, size))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if any(layer.positions != cache[0].positions for layer in cache):
        raise CheckpointError(
            f"{path}: its layers are at different positions; the file is damaged."
        )
    found = metadata.get(FINGERPRINT)
    if found is not None and found != fingerprint(model):
        raise CheckpointError(
            f"{path}: saved by another model (fingerprint {shown(found[:8])}, this one is"
            f" {fingerprint(model)[:8]!r}); load it with that model."
        )
    return cache, metadata


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a state file, if it is not too long."""
    try:
        with path.open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
        too_long = MAX_HEADER_BYTES < nbytes < path.stat().st_size
    except OSError:
        too_long = False  # `read_header` reports the error
    if too_long:
        raise _foreign(path, f"its header has {nbytes} bytes, expected at most {MAX_HEADER_BYTES}")
    return read_header(path)


def _caches(
    path: Path, arrays: Mapping[str, mx.array], header: Mapping[str, str]
) -> list[GriffinCache]:
    """Build the caches of the layers from their arrays, `0.0` to `N.2`."""
    names: list[str] = []
    while (name := header.get(f"1.{len(names)}")) is not None:
        names.append(name)
    if not names or arrays.keys() != {f"{i}.{j}" for i in range(len(names)) for j in range(3)}:
        raise _foreign(path, "it holds other tensors")
    cache = []
    for i, name in enumerate(names):
        if name not in CACHE_CLASSES:
            raise _foreign(path, f"it holds a {shown(name)}")
        try:
            cache.append(CACHE_CLASSES[name].from_state([arrays[f"{i}.{j}"] for j in range(3)]))
        except ValueError as error:
            raise CheckpointError(f"{path}: layer {i}: {error}") from error
    return cache


def _foreign(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a prompt cache of RecurrentGemma ({why}).")


def pending_token(path: str | Path, model: Model, metadata: Mapping[str, str]) -> int | None:
    """Return the pending token of a saved session, which it has seen but not read.

    Raises:
        CheckpointError: If the model has no such token.
    """
    text = metadata.get(PENDING)
    if text is None:
        return None
    known = model.args.vocab_size
    # The length is checked first: Python refuses to read thousands of digits.
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and int(text) < known):
        raise CheckpointError(
            f"{path}: {PENDING} is {shown(text)}, expected a token from 0 to {known - 1}."
        )
    return int(text)
