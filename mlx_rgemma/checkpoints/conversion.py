"""From a checkpoint to another: its dtype changed, quantized or dequantized, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_rgemma.checkpoints.contents import EMBEDDING, PACKED, Contents, Expected, check_contents
from mlx_rgemma.checkpoints.folder import CheckpointFolder, shortened
from mlx_rgemma.checkpoints.loading import read_dtype, read_tensors
from mlx_rgemma.checkpoints.model_card import ignored_by_mlx_lm
from mlx_rgemma.checkpoints.output import refuse_existing
from mlx_rgemma.checkpoints.quantization import Quantization
from mlx_rgemma.checkpoints.recipes import Recipe
from mlx_rgemma.checkpoints.safetensors import MLX_NAME, TensorInfo
from mlx_rgemma.checkpoints.source import Source, locate
from mlx_rgemma.checkpoints.tokenizer import has_tokenizer, load_tokenizer
from mlx_rgemma.checkpoints.writing import (
    Written,
    dtype_name,
    dtype_title,
    stored_config,
    write_checkpoint,
)
from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.griffin.config import GriffinConfig

EXPONENT = {
    "float32": (mx.uint32, 0x7F800000),
    "bfloat16": (mx.uint16, 0x7F80),
    "float16": (mx.uint16, 0x7C00),
}
"""Bits of the exponent of each dtype, and the whole numbers to look at them with."""

CHECKED_TOGETHER = 1 << 22


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        folder: The new folder.
        nbytes: Size of its weights.
        parameters: Number of the model's parameters.
        stored: How the weights are stored, in words.
        kept: Paths of the matrices that were not quantized although the rest was: their rows are
            no whole number of groups.
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
    *,
    progress: bool = False,
) -> Conversion:
    """Convert a checkpoint to a folder that this package and plain mlx-lm run.

    Quantized are the projections and the embedding; gates, convolution, recurrent parameters,
    biases and norms are stored in `dtype`. Everything is checked before anything is written, one
    tensor is in memory at a time, and the new folder appears whole or not at all.

    Args:
        hf_path: Folder in Hugging Face's layout (also one that was converted before), or
            repository of the Hugging Face Hub.
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
        progress: Show a progress bar.

    Raises:
        UserError: If the arguments are impossible.
        CheckpointError: If the source is missing, damaged or of another model, or the target
            exists or cannot be written.
    """
    recipe = _recipe(quantize, dequantize, q_mode, q_bits, q_group_size, quant_predicate)
    chosen = None if dtype is None else read_dtype(dtype)
    target = Path(mlx_path).expanduser()
    refuse_existing(target)
    source = locate(hf_path, revision)
    folder = CheckpointFolder.open(source.folder)
    contents = check_contents(folder)
    if dequantize and not contents.quantized:
        raise UserError(f"{source.folder}: not quantized, there is nothing to dequantize.")
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
    checkpoint = Written(
        stored_config(config, chosen, quantized),
        list(_layout(contents, quantized, dtype_name(chosen))),
        source=source,
        values=folder.values,
        how=f"Its weights are {stored}.",
    )
    weights = _Weights(folder, contents, quantized, chosen)
    write_checkpoint(target, checkpoint, iter(weights), progress=progress)
    return Conversion(
        target,
        checkpoint.nbytes,
        sum(wanted.size for wanted in contents.expected),
        stored,
        kept,
        tuple(_notes(folder, contents, weights, recipe)),
    )


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


def _stored_dtype(folder: CheckpointFolder, contents: Contents) -> mx.Dtype:
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
    contents: Contents, recipe: Recipe | None, dequantize: bool, num_layers: int
) -> tuple[dict[str, Quantization], tuple[str, ...]]:
    """How each matrix will be quantized, and which will not though they were meant to be."""
    if recipe is None:
        return ({} if dequantize else contents.quantized), ()
    shapes = {wanted.path: wanted.shape for wanted in contents.expected if wanted.matrix}
    meant = {path: recipe.of(path, num_layers) for path in shapes}
    quantized = {path: how for path, how in meant.items() if how.fits(shapes[path])}
    return quantized, tuple(path for path in shapes if path not in quantized)


def _layout(
    contents: Contents, quantized: dict[str, Quantization], dtype: str
) -> Iterator[TensorInfo]:
    """Name, dtype and shape of what will be written."""
    for wanted in contents.expected:
        if wanted.matrix and wanted.path in quantized:
            yield from quantized[wanted.path].packed(wanted.path, wanted.shape, dtype)
        else:
            yield TensorInfo(wanted.name, dtype, wanted.shape)


class _Weights:
    """The converted tensors, one after the other, each made when its turn comes.

    Attributes:
        not_finite: Names of the tensors so far that hold NaN or infinity.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        contents: Contents,
        quantized: dict[str, Quantization],
        dtype: mx.Dtype,
    ) -> None:
        self.folder = folder
        self.contents = contents
        self.quantized = quantized
        self.dtype = dtype
        self.not_finite: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, mx.array]]:
        tensors = read_tensors(self.folder, self.contents)
        for wanted in self.contents.expected:
            found = self.contents.quantized.get(wanted.path) if wanted.matrix else None
            if found is None:
                parts = [tensors.pop(wanted.name)]
            else:
                names = (f"{wanted.path}.{part}" for part in PACKED)
                parts = [tensors.pop(name) for name in names if name in tensors]
            try:
                mx.eval(parts)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{self.folder.tensors[wanted.name].file}: {wanted.name} cannot be read"
                    f" ({error})."
                ) from error
            for name, value in self._converted(wanted, parts, found):
                if mx.issubdtype(value.dtype, mx.floating) and not all_finite(value):
                    self.not_finite.append(name)
                yield name, value
            del parts, value
            mx.clear_cache()

    def _converted(
        self, wanted: Expected, parts: list[mx.array], found: Quantization | None
    ) -> Iterator[tuple[str, mx.array]]:
        how = self.quantized.get(wanted.path) if wanted.matrix else None
        if found is not None and found == how:
            packed = [self._cast(part) for part in parts]
        else:
            value = self._dense(wanted, parts, found)
            if how is None:
                yield wanted.name, value
                return
            packed = list(mx.quantize(value, how.group_size, how.bits, mode=how.mode))
        for part, value in zip(PACKED, packed, strict=False):
            yield f"{wanted.path}.{part}", value

    def _dense(
        self, wanted: Expected, parts: list[mx.array], found: Quantization | None
    ) -> mx.array:
        """A tensor unquantized, in the model's layout and the new dtype."""
        value = parts[0]
        if found is not None:
            # In float32, so that the values are rounded once, to the new dtype.
            scales, *biases = (_in_float32(part) for part in parts[1:])
            value = mx.dequantize(
                value,
                scales,
                biases[0] if biases else None,
                group_size=found.group_size,
                bits=found.bits,
                mode=found.mode,
            )
        elif value.shape != wanted.shape:
            value = value.moveaxis(2, 1)  # the convolution, in Hugging Face's layout
        return self._cast(value)

    def _cast(self, value: mx.array) -> mx.array:
        return value.astype(self.dtype) if mx.issubdtype(value.dtype, mx.floating) else value


def all_finite(value: mx.array) -> bool:
    """Whether no element is NaN or infinite: in those, all bits of the exponent are set.

    The bits are looked at directly, a part at a time: nine times as fast on a CPU as asking MLX,
    without temporaries of the size of the tensor.
    """
    unsigned, exponent = EXPONENT[str(value.dtype).removeprefix("mlx.core.")]
    bits = np.array(value.view(unsigned), copy=False).reshape(-1)
    return not any(
        ((bits[at : at + CHECKED_TOGETHER] & exponent) == exponent).any()
        for at in range(0, bits.size, CHECKED_TOGETHER)
    )


def _in_float32(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


def _notes(
    folder: CheckpointFolder, contents: Contents, weights: _Weights, recipe: Recipe | None
) -> Iterator[str]:
    if contents.redundant:
        yield "lm_head.weight says again what the embedding says and was left out."
    if recipe is not None and contents.quantized:
        yield "The source was quantized already; converting the original gives a better model."
    if weights.not_finite:
        yield f"NaN or infinite values in: {shortened(weights.not_finite)}."
    if not has_tokenizer(folder.path):
        yield f"There is no tokenizer in {folder.path}."
    ignored = ignored_by_mlx_lm(folder.config)
    if ignored:
        yield f"This package runs the model, plain mlx-lm cannot: {', '.join(ignored)}."
