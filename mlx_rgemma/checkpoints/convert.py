"""From a checkpoint to another: its dtype changed, quantized or dequantized, tensor by tensor."""

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
    """What a conversion made.

    Attributes:
        folder: The new folder.
        nbytes: Size of its weights.
        parameters: Number of the model's parameters.
        stored: How the weights are stored, in words.
        kept: Paths of the matrices that were not quantized although the rest was: their rows are
            no integer of groups.
        notes: What the user should know, one sentence each.
    """

    folder: Path
    nbytes: int
    parameters: int
    stored: str
    kept: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits that a parameter takes on average."""
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
    """Convert a checkpoint to a folder that this package and plain mlx-lm run.

    Quantized are the projections and the embedding; gates, convolution, recurrent parameters,
    biases and norms are stored in `dtype`. Everything is checked before anything is written, one
    tensor is in memory at a time, and the new folder appears whole or not at all.

    Args:
        hf_path: Folder in Hugging Face's layout (also one that was converted before), repository
            of the Hugging Face Hub, Google's `.pt` file or Flax folder, or a `.tar.gz` of any of
            these. What it is, is found out by looking.
        mlx_path: The folder to be; nothing of that name may exist.
        quantize: Quantize the weights.
        q_group_size: Weights that share a scale, by default the mode's.
        q_bits: Bits of a weight, by default the mode's; those of the recipe `rgemma` in affine
            mode.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        dtype: dtype of what is not quantized, by default what the configuration says.
        dequantize: Make a quantized checkpoint a plain one.
        revision: Branch, tag or commit of a repository.
        quant_predicate: A recipe that gives each matrix its own bits: `rgemma`, or one of
            mlx-lm's `mixed_2_6`, `mixed_3_4`, `mixed_3_6` and `mixed_4_6`.
        upload_repo: Repository of the Hugging Face Hub to upload the new folder to.
        attention_window_size: Past keys that a query sees, where Google's formats need to be told
            because the model is of no released shape.
        logits_soft_cap: Cap of the logits (0: none), in the same case.
        embeddings_scale: Whether embeddings are multiplied by sqrt(hidden_size), in the same case.
        strict: Refuse weights that are NaN or infinite; otherwise they are reported.
        progress: Show a progress bar.

    Raises:
        UserError: If the arguments are impossible.
        CheckpointError: If the source is missing, damaged or of another model, or the target
            exists or cannot be written, or the Hub cannot be reached.
    """
    recipe = _recipe(quantize, dequantize, q_mode, q_bits, q_group_size, quant_predicate)
    chosen = None if dtype is None else read_dtype(dtype)
    target = Path(mlx_path).expanduser()
    refuse_existing(target)
    if upload_repo is not None:
        check_repository(upload_repo)
    unsaid = ConfigOverrides(attention_window_size, logits_soft_cap, embeddings_scale)
    with open_checkpoint(hf_path, revision, target, unsaid, progress=progress) as opened:
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
        raise UserError(f"{folder.path}: not quantized, there is nothing to dequantize.")
    chosen = chosen or _stored_dtype(folder, contents)
    config = _with_stops(folder.config, source)
    quantized, kept = _plan(contents, recipe, dequantize, config.num_hidden_layers)
    if recipe is not None and not quantized:
        widths = sorted({wanted.shape[-1] for wanted in contents.expected if wanted.matrix})
        raise UserError(
            f"q-group-size is {recipe.default.group_size}, which divides no matrix of this model"
            f" (widths {', '.join(map(str, widths))}); choose a smaller one."
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
    """Refuse a checkpoint whose largest tensor memory cannot hold, as it is and converted.

    Raises:
        UserError: Naming what it needs and what is available.
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
    """What to quantize to, if the arguments go together."""
    if quantize and dequantize:
        raise UserError("quantize and dequantize exclude each other; choose one.")
    recipe = Recipe.choose(mode, bits, group_size, predicate)
    if quantize:
        return recipe
    if (mode, bits, group_size, predicate) != ("affine", None, None, None):
        raise UserError("q-bits, q-group-size, q-mode and quant-predicate need -q (quantize).")
    return None


def _stored_dtype(folder: CheckpointFolder, contents: ValidatedCheckpoint) -> mx.Dtype:
    """The dtype that the configuration names, else the one that the embedding has."""
    if folder.config.dtype is not None:
        return getattr(mx, folder.config.dtype)
    how = contents.quantized.get(EMBEDDING)
    name = "weight" if how is None else "scales"
    if how is not None and how.mode != "affine":
        return mx.bfloat16
    return getattr(mx, MLX_NAME[folder.tensors[f"{EMBEDDING}.{name}"].dtype])


def _with_stops(config: GriffinConfig, source: Source) -> GriffinConfig:
    """The configuration, with the tokens that the tokenizer knows to end a text or a turn."""
    if not has_tokenizer(source.folder):
        return config
    tokenizer = load_tokenizer(source.folder, config.eos_token_ids, name=source.name)
    stops = (*config.eos_token_ids, *sorted(tokenizer.eos_token_ids))
    known = tuple(dict.fromkeys(stop for stop in stops if stop < config.vocab_size))
    return replace(config, eos_token_ids=known)


def _plan(
    contents: ValidatedCheckpoint, recipe: Recipe | None, dequantize: bool, num_layers: int
) -> tuple[dict[str, Quantization], tuple[str, ...]]:
    """How each matrix will be quantized, and which will not though they were meant to be."""
    if recipe is None:
        return ({} if dequantize else contents.quantized), ()
    shapes = {wanted.path: wanted.shape for wanted in contents.expected if wanted.matrix}
    meant = {path: recipe.of(path, num_layers) for path in shapes}
    quantized = {path: how for path, how in meant.items() if how.fits(shapes[path])}
    return quantized, tuple(path for path in shapes if path not in quantized)


def _layout(
    contents: ValidatedCheckpoint, quantized: dict[str, Quantization], dtype: str
) -> Iterator[TensorInfo]:
    """Name, dtype and shape of what will be written."""
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
        yield "lm_head.weight says again what the embedding says and was left out."
    if recipe is not None and contents.quantized:
        yield "The source was quantized already; converting the original gives a better model."
    if weights.nonfinite:
        yield f"NaN or infinite values in: {weights.nonfinite_summary}."
    if not has_tokenizer(source.folder):
        yield f"There is no tokenizer in {source.folder}."
    ignored = ignored_by_mlx_lm(folder.config)
    if ignored:
        yield f"This package runs the model, plain mlx-lm cannot: {', '.join(ignored)}."
