"""States in files, in mlx-lm's prompt-cache format, checked against the model when loaded."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_rgemma import distributed
from mlx_rgemma.checkpoints.safetensors import check_file
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.generation.device import settle
from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.griffin.process import refuse_forked_process
from mlx_rgemma.griffin.sharding import gather_state, split_state
from mlx_rgemma.registration import register

FINGERPRINT = "fingerprint"
PENDING = "pending_token"
"""Where a saved session says which token comes next: it has been seen, but not yet read."""


def fingerprint(model: Model) -> str:
    """A short name of the model that a state belongs to: of its shape, window rule and weights.

    The weights enter by their norms, which quantization leaves alone, rounded to bfloat16, so
    that the same checkpoint has one fingerprint in every precision.
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

    The file appears whole or not at all. Of processes that share a model, all must call this; the
    first one writes the file, which is the one that a single process would write.

    Args:
        path: The file; one that exists is replaced.
        model: The model that made the state.
        cache: The state.
        metadata: Texts to keep with it.
    """
    refuse_forked_process()
    if model.group is None:
        return _write(Path(path), model, cache, metadata)
    settle()
    whole = gather_state(cache, model.group)
    mx.eval([layer.state for layer in whole])
    distributed.outcome(lambda: _write(Path(path), model, whole, metadata), model.group)


def _write(
    path: Path, model: Model, cache: list[GriffinCache], metadata: Mapping[str, str] | None
) -> None:
    from mlx_lm.models.cache import save_prompt_cache as mlx_lm_save

    register()
    handle, temporary = tempfile.mkstemp(
        suffix=".safetensors", prefix=f".{path.name}-", dir=path.parent
    )
    os.close(handle)
    try:
        mlx_lm_save(temporary, cache, {**(metadata or {}), FINGERPRINT: fingerprint(model)})
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_prompt_cache(path: str | Path, model: Model) -> list[GriffinCache]:
    """Load a state and check that it belongs to the model.

    Args:
        path: A file that `save_prompt_cache`, `Session.save` or mlx-lm wrote.
        model: The model that is to continue from it.

    Raises:
        CheckpointError: If the file is missing, damaged, or of another model, window or shape.
    """
    cache, metadata = read_prompt_cache(path, model)
    pending = pending_token(path, model, metadata)
    if pending is not None:
        model.read(mx.array([[pending]]), cache)
        mx.eval([layer.state for layer in cache])
    return cache


def read_prompt_cache(path: str | Path, model: Model) -> tuple[list[GriffinCache], dict[str, str]]:
    """Load a state as it lies in its file, and the texts kept with it.

    Of processes that share a model, all must call this; the first one reads the file, and each
    gets its part.

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

    metadata = distributed.outcome(read, group)
    arrays = distributed.share_arrays([a for layer in whole for a in layer.state], group)
    states = [arrays[i : i + 3] for i in range(0, len(arrays), 3)]
    kinds = [type(layer) for layer in model.make_cache()]
    cache = [kind.from_state(state) for kind, state in zip(kinds, states, strict=True)]
    return split_state(cache, group.rank(), group.size()), metadata


def _read(path: Path, model: Model) -> tuple[list[GriffinCache], dict[str, str]]:
    from mlx_lm.models.cache import load_prompt_cache as mlx_lm_load

    register()
    check_file(path)
    try:
        cache, metadata = mlx_lm_load(str(path), return_metadata=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # whatever a foreign file makes the reader stumble over
        raise CheckpointError(
            f"{path}: not a prompt cache of RecurrentGemma ({type(error).__name__}: {error})."
        ) from error
    try:
        size = 1 if model.group is None else model.group.size()
        model.check_cache(split_state(cache, 0, size))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    metadata = metadata if isinstance(metadata, dict) else {}
    found = metadata.get(FINGERPRINT)
    if found is not None and found != fingerprint(model):
        raise CheckpointError(
            f"{path}: saved by another model (fingerprint {found[:8]}, this one is"
            f" {fingerprint(model)[:8]}); load it with the model that made it."
        )
    return cache, metadata


def pending_token(path: str | Path, model: Model, metadata: Mapping[str, str]) -> int | None:
    """The token that a saved session has seen but not read.

    Raises:
        CheckpointError: If it is none that the model knows.
    """
    text = metadata.get(PENDING)
    if text is None:
        return None
    known = model.args.vocab_size
    if not (text.isascii() and text.isdigit() and int(text) < known):
        raise CheckpointError(
            f"{path}: {PENDING} is {text[:20]!r}, expected a token from 0 to {known - 1}."
        )
    return int(text)
