"""Reading and converting the tensors of a checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.quantization import Quantization
from mlx_rgemma.checkpoints.schema import PACKED, TensorSpec, ValidatedCheckpoint
from mlx_rgemma.errors import CheckpointError, UserError, shortened, shown
from mlx_rgemma.griffin.config import DTYPES
from mlx_rgemma.io.reading import reason

EXPONENT = {
    "float32": (mx.uint32, 0x7F800000, 0x007FFFFF),
    "bfloat16": (mx.uint16, 0x7F80, 0x007F),
    "float16": (mx.uint16, 0x7C00, 0x03FF),
}
"""Per dtype: integer view, exponent mask, fraction mask."""

ELEMENTS_AT_ONCE = 1 << 22


def read_dtype(dtype: mx.Dtype | str) -> mx.Dtype:
    """Return a dtype of weights, given by itself or by its name.

    Raises:
        UserError: If weights cannot have it.
    """
    name = str(dtype).removeprefix("mlx.core.")
    if name not in DTYPES:
        raise UserError(f"dtype is {shown(name)}, expected one of {', '.join(DTYPES)}.")
    return getattr(mx, name)


def read_tensors(folder: CheckpointFolder, contents: ValidatedCheckpoint) -> dict[str, mx.array]:
    """Return all tensors of a checkpoint, lazily: each stays in its file until it is evaluated.

    Raises:
        CheckpointError: If MLX cannot read a file.
    """
    tensors: dict[str, mx.array] = {}
    for file in folder.files:
        try:
            tensors.update(mx.load(str(file)))  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read ({reason(error)}).") from error
    for name in contents.redundant:
        del tensors[name]
    return tensors


class ConvertedWeights:
    """Iterator over converted tensors, each of which is made when it is requested.

    The writer pulls: it requests a tensor, which is then read, converted and checked here.

    Attributes:
        nonfinite: Numbers of NaN and of infinite values, by the name of the tensor; so far, and
            only of tensors that hold any.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        contents: ValidatedCheckpoint,
        quantized: dict[str, Quantization],
        dtype: mx.Dtype,
        strict: bool = False,
    ) -> None:
        """
        Args:
            folder: The checkpoint.
            contents: Its contents.
            quantized: Quantization of the converted matrices, by the path of their module.
            dtype: dtype of all other tensors.
            strict: Refuse NaN and infinite values.
        """
        self.folder = folder
        self.contents = contents
        self.quantized = quantized
        self.dtype = dtype
        self.strict = strict
        self.nonfinite: dict[str, tuple[int, int]] = {}

    @property
    def nonfinite_summary(self) -> str:
        """Names of tensors with NaN or infinite values, and their numbers, as text."""
        return shortened(
            f"{name} ({nan} NaN, {infinite} infinite)"
            for name, (nan, infinite) in self.nonfinite.items()
        )

    def __iter__(self) -> Iterator[tuple[str, mx.array]]:
        tensors = read_tensors(self.folder, self.contents) if self.folder.read is None else {}
        for wanted in self.contents.expected:
            found = self.contents.quantized.get(wanted.path) if wanted.matrix else None
            if self.folder.read is not None:
                parts = [self.folder.read(wanted.name)]
            elif found is None:
                parts = [tensors.pop(wanted.name)]
            else:
                names = (f"{wanted.path}.{part}" for part in PACKED)
                parts = [tensors.pop(name) for name in names if name in tensors]
            try:
                mx.eval(parts)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{self.folder.tensors[wanted.name].file}: {wanted.name} cannot be read"
                    f" ({reason(error)})."
                ) from error
            for name, value in self._converted(wanted, parts, found):
                parts.clear()
                yield name, value
            del value
            mx.clear_cache()

    def _converted(
        self, wanted: TensorSpec, parts: list[mx.array], found: Quantization | None
    ) -> Iterator[tuple[str, mx.array]]:
        how = self.quantized.get(wanted.path) if wanted.matrix else None
        if found is not None and found == how:
            packed = [self._cast(part) for part in parts]
            for value in packed[1:]:
                self._count_nonfinite(wanted.name, value)
        else:
            value = self._dense(wanted, parts, found)
            self._count_nonfinite(wanted.name, value)
            if how is None:
                yield wanted.name, value
                return
            packed = list(mx.quantize(value, how.group_size, how.bits, mode=how.mode))
            mx.eval(packed)
            del value
        for part, value in zip(PACKED, packed, strict=False):
            yield f"{wanted.path}.{part}", value

    def _dense(
        self, wanted: TensorSpec, parts: list[mx.array], found: Quantization | None
    ) -> mx.array:
        """Return a tensor dequantized, in MLX's layout and the new dtype."""
        value = parts[0]
        if found is not None:
            # In float32, so that values are rounded only once, to the new dtype.
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

    def _count_nonfinite(self, name: str, value: mx.array) -> None:
        """Count the NaN and infinite values of a tensor as it will be stored."""
        nan, infinite = count_nonfinite(value)
        if nan or infinite:
            before = self.nonfinite.get(name, (0, 0))
            self.nonfinite[name] = (before[0] + nan, before[1] + infinite)
            if self.strict:
                file = self.folder.tensors[name].file
                raise CheckpointError(
                    f"{file}: NaN or infinite values in {self.nonfinite_summary}; without --strict"
                    " they are reported and converted."
                )


def count_nonfinite(value: mx.array) -> tuple[int, int]:
    """Return the numbers of NaN and of infinite elements: those with all exponent bits set.

    The bits are compared in NumPy, chunk by chunk: on a CPU nine times as fast as MLX's functions,
    without temporary arrays of the size of the tensor.

    Returns:
        Both numbers; 0, 0 for integers.
    """
    dtype = str(value.dtype).removeprefix("mlx.core.")
    if dtype not in EXPONENT:
        return 0, 0
    unsigned, exponent, fraction = EXPONENT[dtype]
    bits = np.array(value.view(unsigned), copy=False).reshape(-1)
    nan = infinite = 0
    for start in range(0, bits.size, ELEMENTS_AT_ONCE):
        chunk = bits[start : start + ELEMENTS_AT_ONCE]
        nonfinite = chunk[(chunk & exponent) == exponent]
        if nonfinite.size:
            nans = int(np.count_nonzero(nonfinite & fraction))
            nan += nans
            infinite += nonfinite.size - nans
    return nan, infinite


def _in_float32(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
