"""Conversion of a checkpoint tensor by tensor: dtype, quantization, dequantization.

`convert` opens and validates the source and plans the new tensors; `save.write_checkpoint` then
pulls them one at a time from `tensors.ConvertedWeights`, so that one tensor is in memory at once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_rgemma.checkpoints.formats.google import ConfigOverrides
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.formats.open import OpenCheckpoint, open_checkpoint
from mlx_rgemma.checkpoints.model_card import ignored_by_mlx_lm
from mlx_rgemma.checkpoints.quantization import Quantization, Recipe
from mlx_rgemma.checkpoints.save import (
    CheckpointSpec,
    dtype_name,
    dtype_title,
    stored_config,
    write_checkpoint,
)
from mlx_rgemma.checkpoints.schema import EMBEDDING, PACKED, ValidatedCheckpoint, check_contents
from mlx_rgemma.checkpoints.tensors import ConvertedWeights, read_dtype
from mlx_rgemma.checkpoints.upload import check_repository, upload
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.io.atomic import refuse_existing
from mlx_rgemma.io.hub import Source
from mlx_rgemma.io.memory import check_memory
from mlx_rgemma.io.safetensors import MLX_NAME, TensorInfo, verify_checksums
from mlx_rgemma.tokenizers.load import has_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        folder: The new folder.
        nbytes: Bytes of its weights.
        parameters: Number of parameters.
        stored: Description of the stored weights.
        kept: Paths of the matrices that could not be quantized: the group size does not divide
            their width.
        notes: Notes for the user, one sentence each.
    """

    folder: Path
    nbytes: int
    parameters: int
    stored: str
    kept: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per parameter."""
        return self.nbytes * 8 / self.parameters


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: mx.Dtype | str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    quant_predicate: str | None = None,
    upload_repo: str | None = None,
    *,
    attention_window_size: int | None = None,
    logits_soft_cap: float | None = None,
    embeddings_scale: bool | None = None,
    strict: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert a checkpoint to a folder for this package and plain mlx-lm.

    Projections and the embedding are quantized; gates, convolution, Lambda, biases and norms are
    stored in `dtype`. The source is validated before anything is written, one tensor is in memory
    at a time, and the new folder appears atomically.

    Args:
        hf_path: Folder in Hugging Face's layout (also a converted one), repository of the Hugging
            Face Hub, Google's `.pt` file or Flax folder, or a `.tar.gz` of any of these. The format
            is detected.
        mlx_path: The new folder; it must not exist.
        quantize: Quantize the weights.
        q_group_size: Weights per scale. Default: that of the mode.
        q_bits: Bits per weight. Default: that of the mode; in affine mode, those of the recipe
            `rgemma`.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        dtype: dtype of unquantized tensors. Default: that of the configuration.
        dequantize: Dequantize a quantized checkpoint.
        revision: Branch, tag or commit of a repository.
        quant_predicate: Recipe of bits per matrix: `rgemma`, or mlx-lm's `mixed_2_6`, `mixed_3_4`,
            `mixed_3_6` and `mixed_4_6`.
        upload_repo: Repository of the Hugging Face Hub to upload the new folder to.
        attention_window_size: Attention window of a model in Google's formats that has no released
            shape.
        logits_soft_cap: Its soft cap of the logits; 0 for none.
        embeddings_scale: Whether its embeddings are multiplied by sqrt(hidden_size).
        strict: Refuse NaN and infinite weights; otherwise they are reported.
        progress: Show a progress bar.

    Returns:
        A description of the new folder.

    Raises:
        UserError: If the arguments contradict each other.
        CheckpointError: If the source is missing, damaged or of another model, or the target
            exists or cannot be written, or the Hub cannot be reached.
    """
    recipe = _recipe(quantize, dequantize, q_mode, q_bits, q_group_size, quant_predicate)
    chosen = None if dtype is None else read_dtype(dtype)
    target = Path(mlx_path).expanduser()
    refuse_existing(target)
    if upload_repo is not None:
        check_repository(upload_repo)
    overrides = ConfigOverrides(attention_window_size, logits_soft_cap, embeddings_scale)
    with open_checkpoint(hf_path, revision, target, overrides, progress=progress) as opened:
        made = _convert(opened, target, recipe, chosen, dequantize, strict, progress)
    if upload_repo is not None:
        upload(target, upload_repo)
    return made


def _convert(
    opened: OpenCheckpoint,
    target: Path,
    recipe: Recipe | None,
    chosen: mx.Dtype | None,
    dequantize: bool,
    strict: bool,
    progress: bool,
) -> Conversion:
    source, folder = opened.source, opened.folder
    contents = check_contents(folder)
    if dequantize and not contents.quantized:
        raise UserError(f"{folder.path}: not quantized; leave out --dequantize.")
    chosen = chosen or _stored_dtype(folder, contents)
    config = _with_stops(folder.config, source)
    quantized, kept = _plan(contents, recipe, dequantize, config.num_hidden_layers)
    if recipe is not None and not quantized:
        widths = sorted({wanted.shape[-1] for wanted in contents.expected if wanted.matrix})
        raise UserError(
            f"q-group-size is {recipe.default.group_size}, which divides no width of this model's"
            f" matrices ({', '.join(map(str, widths))}); choose a smaller one."
        )
    stored = dtype_title(chosen, quantized)
    checkpoint = CheckpointSpec(
        stored_config(config, chosen, quantized),
        list(_layout(contents, quantized, dtype_name(chosen))),
        source=source,
        values=folder.values,
        how=f"Its weights are {stored}.",
    )
    _check_memory(folder, checkpoint)
    if folder.read is None:
        for file in folder.files:
            verify_checksums(file)
    weights = ConvertedWeights(folder, contents, quantized, chosen, strict)
    write_checkpoint(target, checkpoint, iter(weights), progress=progress)
    return Conversion(
        target,
        checkpoint.nbytes,
        sum(wanted.size for wanted in contents.expected),
        stored,
        kept,
        (*opened.notes, *_notes(source, folder, contents, weights, recipe)),
    )


def _check_memory(folder: CheckpointFolder, checkpoint: CheckpointSpec) -> None:
    """Refuse a checkpoint whose largest tensor, before and after conversion, exceeds the memory.

    Raises:
        UserError: Naming the bytes that are needed and available.
    """
    sizes: Counter[str] = Counter()
    for info in (*folder.tensors.values(), *checkpoint.tensors):
        path, _, part = info.name.rpartition(".")
        sizes[path if part in PACKED else info.name] += info.nbytes
    ((largest, needed),) = sizes.most_common(1)
    check_memory(f"{folder.path}: converting {largest}", needed, "use a machine with more memory")


def _recipe(
    quantize: bool,
    dequantize: bool,
    mode: str,
    bits: int | None,
    group_size: int | None,
    predicate: str | None,
) -> Recipe | None:
    """Return the recipe of the arguments, or None without quantization."""
    if quantize and dequantize:
        raise UserError("quantize and dequantize exclude each other; choose one.")
    recipe = Recipe.choose(mode, bits, group_size, predicate)
    if quantize:
        return recipe
    if (mode, bits, group_size, predicate) != ("affine", None, None, None):
        raise UserError("q-bits, q-group-size, q-mode and quant-predicate need -q (quantize).")
    return None


def _stored_dtype(folder: CheckpointFolder, contents: ValidatedCheckpoint) -> mx.Dtype:
    """Return the dtype of the configuration, else that of the embedding."""
    if folder.config.dtype is not None:
        named: mx.Dtype = getattr(mx, folder.config.dtype)
        return named
    how = contents.quantized.get(EMBEDDING)
    name = "weight" if how is None else "scales"
    if how is not None and how.mode != "affine":
        return mx.bfloat16
    stored: mx.Dtype = getattr(mx, MLX_NAME[folder.tensors[f"{EMBEDDING}.{name}"].dtype])
    return stored


def _with_stops(config: GriffinConfig, source: Source) -> GriffinConfig:
    """Add the tokenizer's end-of-text and end-of-turn tokens to a configuration."""
    if not has_tokenizer(source.folder):
        return config
    tokenizer = load_tokenizer(source.folder, config.eos_token_ids, name=source.name)
    stops = (*config.eos_token_ids, *sorted(tokenizer.eos_token_ids))
    known = tuple(dict.fromkeys(stop for stop in stops if stop < config.vocab_size))
    return replace(config, eos_token_ids=known)


def _plan(
    contents: ValidatedCheckpoint, recipe: Recipe | None, dequantize: bool, num_layers: int
) -> tuple[dict[str, Quantization], tuple[str, ...]]:
    """Return the quantization of each matrix, and the paths of those that cannot be quantized."""
    if recipe is None:
        return ({} if dequantize else contents.quantized), ()
    shapes = {wanted.path: wanted.shape for wanted in contents.expected if wanted.matrix}
    planned = {path: recipe.of(path, num_layers) for path in shapes}
    quantized = {path: how for path, how in planned.items() if how.fits(shapes[path])}
    return quantized, tuple(path for path in shapes if path not in quantized)


def _layout(
    contents: ValidatedCheckpoint, quantized: dict[str, Quantization], dtype: str
) -> Iterator[TensorInfo]:
    """Yield name, dtype and shape of the new tensors."""
    for wanted in contents.expected:
        if wanted.matrix and wanted.path in quantized:
            yield from quantized[wanted.path].packed(wanted.path, wanted.shape, dtype)
        else:
            yield TensorInfo(wanted.name, dtype, wanted.shape)


def _notes(
    source: Source,
    folder: CheckpointFolder,
    contents: ValidatedCheckpoint,
    weights: ConvertedWeights,
    recipe: Recipe | None,
) -> Iterator[str]:
    if contents.redundant:
        yield "lm_head.weight is a copy of the embedding and was omitted."
    if recipe is not None and contents.quantized:
        yield "The source was already quantized; converting the original gives a better model."
    if weights.nonfinite:
        yield f"NaN or infinite values in: {weights.nonfinite_summary}."
    if not has_tokenizer(source.folder):
        yield f"There is no tokenizer in {source.folder}."
    ignored = ignored_by_mlx_lm(folder.config)
    if ignored:
        yield f"This package runs the model, plain mlx-lm cannot: {', '.join(ignored)}."
