"""Loading a checkpoint: the model and its tokenizer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.adapters.files import load_adapters, read_adapter_config
from mlx_rgemma.checkpoints.formats.detect import refuse_unconverted
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.schema import FLOATS, ValidatedCheckpoint, check_contents
from mlx_rgemma.checkpoints.sharded_reader import read_shards
from mlx_rgemma.checkpoints.tensors import read_dtype, read_tensors
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.io.hub import locate
from mlx_rgemma.io.memory import check_memory
from mlx_rgemma.io.safetensors import verify_checksums
from mlx_rgemma.tokenizers.fast import fast_tokenizer
from mlx_rgemma.tokenizers.load import load_tokenizer


def load(
    path_or_repo: str | os.PathLike[str] | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    lazy: bool = False,
    window: str = "google",
    revision: str | None = None,
    group: mx.distributed.Group | None = None,
    plain: bool = False,
    verify: bool = False,
) -> tuple[Model, Any]:
    """Load a model and its tokenizer.

    Args:
        path_or_repo: Folder in Hugging Face's layout (mlx-lm's too), repository of the Hugging
            Face Hub, or None for the small model of this package.
        dtype: dtype of the weights ("float32", "bfloat16", "float16"). Default: that of the files
            on a GPU; float32 on a CPU, where MLX multiplies the others slowly.
        adapter_path: Folder with trained adapters, of this package or mlx-lm.
        lazy: Leave the weights in their files until they are used.
        window: "google" for W + 1 keys, as the released models were trained; "hf" for W keys, as
            in transformers and mlx-lm.
        revision: Branch, tag or commit of a repository.
        group: Ranks that share the model; each keeps its shard of the weights.
        plain: Return a `FastTokenizer` if possible: it needs neither transformers nor mlx-lm,
            which take a second to import.
        verify: Compare the weights with their checksums, which reads all files once more. Files
            without checksums pass.

    Returns:
        The model, and mlx-lm's `TokenizerWrapper` (with `plain`, a `FastTokenizer` if possible).

    Raises:
        CheckpointError: If a file is missing, damaged or does not fit; the message names it.
        UserError: If the ranks cannot share the model, or memory cannot hold it.
    """
    chosen = _choose_dtype(dtype)
    if group is not None and adapter_path is not None:
        raise UserError(
            "a sharded model cannot have adapters; fuse them into the model first, with"
            " mlx_rgemma.fuse."
        )
    if adapter_path is not None:
        read_adapter_config(adapter_path)  # before anything slow
    source = locate(path_or_repo, revision)
    refuse_unconverted(source.folder)
    folder = CheckpointFolder.open(source.folder)
    tokenizer = _load_tokenizer(source.folder, folder.config.eos_token_ids, source.name, plain)
    contents = check_contents(folder)
    if verify:
        for file in folder.files:
            verify_checksums(file)
    if not lazy:
        _check_memory(folder, contents, chosen, 1 if group is None else group.size())
    later = lazy or adapter_path is not None
    model, _ = _load_model(folder, contents, chosen, later, window, group)
    if adapter_path is not None:
        load_adapters(model, adapter_path)
        if not lazy:
            model.prepare_for_inference()
    return model, tokenizer


def load_model(
    path: str | os.PathLike[str] | None,
    *,
    dtype: mx.Dtype | str | None = None,
    lazy: bool = False,
    window: str = "google",
    revision: str | None = None,
) -> tuple[Model, GriffinConfig]:
    """Load a model without its tokenizer; the arguments are those of `load`.

    Returns:
        The model and its configuration.

    Raises:
        CheckpointError: If a file is missing, damaged or does not fit; the message names it.
    """
    chosen = _choose_dtype(dtype)
    source = locate(path, revision)
    refuse_unconverted(source.folder)
    folder = CheckpointFolder.open(source.folder)
    contents = check_contents(folder)
    if not lazy:
        _check_memory(folder, contents, chosen)
    return _load_model(folder, contents, chosen, lazy, window)


def _load_tokenizer(folder: Path, eos_token_ids: Iterable[int], name: str, plain: bool) -> Any:
    def wrapper() -> Any:
        return load_tokenizer(folder, eos_token_ids, name=name)

    found = fast_tokenizer(folder, eos_token_ids, wrapper) if plain else None
    return wrapper() if found is None else found


def _choose_dtype(dtype: mx.Dtype | str | None) -> mx.Dtype | None:
    """Return the requested dtype, by default float32 on a CPU; None keeps that of the files."""
    if dtype is not None:
        return read_dtype(dtype)
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else None


def _check_memory(
    folder: CheckpointFolder,
    contents: ValidatedCheckpoint,
    dtype: mx.Dtype | None,
    processes: int = 1,
) -> None:
    """Refuse weights that memory cannot hold.

    Raises:
        UserError: Naming the bytes that are needed and available.
    """
    size = None if dtype is None else dtype.size
    needed = sum(
        math.prod(info.shape) * size if size and info.dtype in FLOATS else info.nbytes
        for name, info in folder.tensors.items()
        if name not in contents.redundant
    )
    check_memory(
        f"{folder.path}: the model",
        needed // processes,
        "choose a dtype of fewer bits, or quantize it with mlx_rgemma.convert -q",
    )


def _load_model(
    folder: CheckpointFolder,
    contents: ValidatedCheckpoint,
    dtype: mx.Dtype | None,
    lazy: bool,
    window: str,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, GriffinConfig]:
    # "google" is the default, so it does not override the window that a file names.
    config = folder.config if window == "google" else folder.config.with_window(window)
    model = Model(config)
    quantized = {path: how.as_dict() for path, how in contents.quantized.items()}
    if quantized:
        nn.quantize(model, class_predicate=lambda path, _: quantized.get(path, False))
    weights = model.sanitize(read_tensors(folder, contents))
    if group is not None:
        model.shard(group)
        weights = read_shards(weights, folder.tensors, group.rank(), group.size())
    if dtype is not None:
        weights = {
            name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
            for name, value in weights.items()
        }
    model.load_weights(list(weights.items()))
    del weights
    model.eval()
    if not lazy:
        model.prepare_for_inference()
    return model, config
