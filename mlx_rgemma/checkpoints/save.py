"""Writing a checkpoint folder that this package, plain mlx-lm and transformers can read."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rgemma.checkpoints.formats.huggingface import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    SINGLE_FILE,
)
from mlx_rgemma.checkpoints.model_card import write_model_card
from mlx_rgemma.checkpoints.quantization import Quantization
from mlx_rgemma.checkpoints.schema import expected_tensors
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.io.atomic import atomic_directory
from mlx_rgemma.io.hub import Source
from mlx_rgemma.io.reading import read_json
from mlx_rgemma.io.safetensors import MLX_NAME, TensorInfo, write_file
from mlx_rgemma.tokenizers.load import (
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_FILES,
    has_tokenizer,
    write_converted,
)

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_rgemma.griffin.model import Model

SHARD_BYTES = 5_000_000_000
"""Maximum size of a weight file, unless a single tensor is larger."""

SUPERSEDED = (
    "_block_types",
    "_name_or_path",
    "quantization",
    "quantization_config",
    "quantize_activations",
    "rope_scaling",
    "window",
)
"""Keys of the source's configuration that are not copied."""

FILE_NAME = {mlx_name: name for name, mlx_name in MLX_NAME.items()}


@dataclass(frozen=True)
class CheckpointSpec:
    """Description of a checkpoint to write.

    Attributes:
        config: Configuration, with dtype and quantization.
        tensors: Tensors, in order.
        source: Source of the tokenizer, the model card and unknown keys of the configuration.
        values: The `config.json` of the source.
        how: One sentence about the weights, for the model card.
    """

    config: GriffinConfig
    tensors: Sequence[TensorInfo]
    source: Source | None = None
    values: Mapping[str, Any] | None = None
    how: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(info.nbytes for info in self.tensors)


def save_model(
    folder: str | os.PathLike[str],
    model: Model,
    *,
    source: str | os.PathLike[str] | None = None,
    dtype: mx.Dtype | None = None,
    torch_layout: bool = False,
    progress: bool = False,
) -> None:
    """Save a model as a new folder, atomically.

    Args:
        folder: The new folder; it must not exist.
        model: The model.
        source: Folder of the original checkpoint, for its tokenizer, model card and unknown keys of
            its configuration; or of a tokenizer alone.
        dtype: dtype of all weights. Default: that of the model.
        torch_layout: Store convolutions as (D, 1, K), so that transformers can load the folder;
            mlx-lm and this package load both layouts.
        progress: Show a progress bar.

    Raises:
        CheckpointError: If the folder exists or cannot be written.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    dtype = dtype or model.dtype
    quantized = {
        path: Quantization(module.group_size, module.bits, module.mode)
        for path, module in model.named_modules()
        if hasattr(module, "bits") and "scales" in module
    }
    parameters: Any = tree_flatten(model.parameters())
    weights = [
        (name, value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value)
        for name, value in parameters
    ]
    if torch_layout:
        weights = [
            (name, value.moveaxis(1, 2) if name.endswith("conv_1d.weight") else value)
            for name, value in weights
        ]
    origin = Source(Path(source)) if source is not None else None
    checkpoint = CheckpointSpec(
        stored_config(model.args, dtype, quantized),
        [TensorInfo(name, dtype_name(value.dtype), value.shape) for name, value in weights],
        source=origin,
        values=_config_of(origin),
        how=f"Its weights are {dtype_title(dtype, quantized)}.",
    )
    write_checkpoint(Path(folder), checkpoint, iter(weights), progress=progress)


def _config_of(source: Source | None) -> Mapping[str, Any] | None:
    """Return the `config.json` of a source, if there is one."""
    if source is None or not (source.folder / CONFIG).is_file():
        return None
    return read_json(source.folder / CONFIG)


def write_checkpoint(
    target: Path,
    checkpoint: CheckpointSpec,
    weights: Iterator[tuple[str, mx.array]],
    *,
    progress: bool = False,
) -> None:
    """Write a checkpoint atomically, with one tensor in memory at a time.

    Args:
        target: The new folder; it must not exist.
        checkpoint: Its description.
        weights: Yields the name and value of each of its tensors, in order.
        progress: Show a progress bar.

    Raises:
        CheckpointError: If the target exists or cannot be written.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    with atomic_directory(target, checkpoint.nbytes) as folder:
        with tqdm(
            total=checkpoint.nbytes,
            desc="Writing",
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            _write_weights(folder, checkpoint, weights, bar.update)
        if checkpoint.source is not None:
            _write_tokenizer(folder, checkpoint.source)
        write_model_card(folder, checkpoint.source, checkpoint.how, checkpoint.config)
        _write_json(folder / GENERATION_CONFIG, _generation_config(checkpoint))
        # The configuration comes last: a folder without it is not a checkpoint.
        _write_json(folder / CONFIG, config_values(checkpoint))


def stored_config(
    config: GriffinConfig, dtype: mx.Dtype, quantized: Mapping[str, Quantization]
) -> GriffinConfig:
    """Return a configuration with the dtype and quantization of stored weights."""
    section = quantization_section(quantized) if quantized else None
    return replace(config, dtype=MLX_NAME[dtype_name(dtype)], quantization=section)


def quantization_section(quantized: Mapping[str, Quantization]) -> dict[str, Any]:
    """Return mlx-lm's `quantization` section: the most common settings, then each exception."""
    common = Counter(quantized.values()).most_common(1)[0][0]
    exceptions = {path: how.as_dict() for path, how in quantized.items() if how != common}
    return {**common.as_dict(), **exceptions}


def config_values(checkpoint: CheckpointSpec) -> dict[str, Any]:
    """Return the `config.json` of a checkpoint, with unknown keys of its source."""
    kept = {k: v for k, v in (checkpoint.values or {}).items() if k not in SUPERSEDED}
    return dict(sorted({**kept, **checkpoint.config.to_dict()}.items()))


def dtype_name(dtype: mx.Dtype) -> str:
    """Return a dtype in safetensors' spelling."""
    return FILE_NAME[str(dtype).removeprefix("mlx.core.")]


def dtype_title(dtype: mx.Dtype, quantized: Mapping[str, Quantization]) -> str:
    """Describe how weights are stored."""
    name = str(dtype).removeprefix("mlx.core.")
    if not quantized:
        return name
    common = Counter(quantized.values()).most_common(1)[0][0]
    mode = "" if common.mode == "affine" else f"{common.mode}, "
    low, high = (choose(how.bits for how in quantized.values()) for choose in (min, max))
    bits = f"{low} bits" if low == high else f"{low} to {high} bits"
    return f"quantized ({mode}{bits}, groups of {common.group_size}), the rest {name}"


def _write_weights(
    folder: Path,
    checkpoint: CheckpointSpec,
    weights: Iterator[tuple[str, mx.array]],
    advance: Any,
) -> None:
    shards = split_shards(checkpoint.tensors)
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, weights, {"format": "mlx"}, advance)
        places.update(dict.fromkeys((info.name for info in shard), name))
    parameters = sum(tensor.size for tensor in expected_tensors(checkpoint.config))
    metadata = {"total_size": checkpoint.nbytes, "total_parameters": parameters}
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / INDEX, index)


def split_shards(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    """Split a list of tensors into files of at most `SHARD_BYTES`."""
    shards: list[list[TensorInfo]] = [[]]
    room = SHARD_BYTES
    for info in tensors:
        if shards[-1] and info.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(info)
        room -= info.nbytes
    return shards


def _write_tokenizer(folder: Path, source: Source) -> None:
    """Copy the source's tokenizer; a SentencePiece model is converted to `tokenizer.json` too."""
    if not has_tokenizer(source.folder):
        return
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    if not (source.folder / TOKENIZER).is_file() and (source.folder / SENTENCEPIECE).is_file():
        write_converted(source.folder, folder, name=source.name)


def _generation_config(checkpoint: CheckpointSpec) -> dict[str, Any]:
    values: dict[str, Any] = {"_from_model_config": True}
    if checkpoint.source is not None:
        stated = checkpoint.source.folder / GENERATION_CONFIG
        values = read_json(stated) if stated.is_file() else values
    config = checkpoint.config.to_dict()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {**values, **{name: config[name] for name in names}}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
