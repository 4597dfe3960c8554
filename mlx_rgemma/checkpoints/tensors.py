"""The converted tensors of a checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.load import read_tensors
from mlx_rgemma.checkpoints.quantization import Quantization
from mlx_rgemma.checkpoints.schema import PACKED, TensorSpec, ValidatedCheckpoint
from mlx_rgemma.errors import CheckpointError, shortened
from mlx_rgemma.io.reading import reason

EXPONENT = {
    "float32": (mx.uint32, 0x7F800000, 0x007FFFFF),
    "bfloat16": (mx.uint16, 0x7F80, 0x007F),
    "float16": (mx.uint16, 0x7C00, 0x03FF),
}
"""The integers to look at each dtype with, and the bits of its exponent and fraction."""

CHECKED_TOGETHER = 1 << 22


class ConvertedWeights:
    """The converted tensors, one after the other, each made when its turn comes.

    Attributes:
        not_finite: How many NaN and how many infinite values the tensors so far hold, by name,
            of those that hold any.
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
            contents: What it holds.
            quantized: How each matrix that is to be quantized is.
            dtype: dtype of what is not quantized.
            strict: Refuse values that are not finite.
        """
        self.folder = folder
        self.contents = contents
        self.quantized = quantized
        self.dtype = dtype
        self.strict = strict
        self.not_finite: dict[str, tuple[int, int]] = {}

    @property
    def nonfinite_summary(self) -> str:
        """The tensors that hold NaN or infinite values, and how many, in words."""
        return shortened(
            f"{name} ({nan} NaN, {infinite} infinite)"
            for name, (nan, infinite) in self.not_finite.items()
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
                self._look(wanted.name, value)
        else:
            value = self._dense(wanted, parts, found)
            self._look(wanted.name, value)
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

    def _look(self, name: str, value: mx.array) -> None:
        """Count what is NaN or infinite, as it will be stored."""
        nan, infinite = count_not_finite(value)
        if nan or infinite:
            before = self.not_finite.get(name, (0, 0))
            self.not_finite[name] = (before[0] + nan, before[1] + infinite)
            if self.strict:
                file = self.folder.tensors[name].file
                raise CheckpointError(
                    f"{file}: NaN or infinite values in {self.nonfinite_summary}; without --strict"
                    " they are reported and converted."
                )


def count_not_finite(value: mx.array) -> tuple[int, int]:
    """How many elements are NaN and how many infinite: of those, all bits of the exponent are set.

    The bits are looked at directly, a part at a time: nine times as fast on a CPU as asking MLX,
    without temporaries of the size of the tensor.

    Returns:
        Both numbers; 0, 0 for what is not of a floating dtype.
    """
    dtype = str(value.dtype).removeprefix("mlx.core.")
    if dtype not in EXPONENT:
        return 0, 0
    unsigned, exponent, fraction = EXPONENT[dtype]
    bits = np.array(value.view(unsigned), copy=False).reshape(-1)
    nan = infinite = 0
    for at in range(0, bits.size, CHECKED_TOGETHER):
        part = bits[at : at + CHECKED_TOGETHER]
        odd = part[(part & exponent) == exponent]
        if odd.size:
            nans = int(np.count_nonzero(odd & fraction))
            nan += nans
            infinite += odd.size - nans
    return nan, infinite


def _in_float32(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
