"""Tensors of a checkpoint: the schema that follows from its configuration, and validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mlx_rgemma.checkpoints.formats.huggingface import CONFIG, CheckpointFolder
from mlx_rgemma.checkpoints.quantization import Quantization, agrees
from mlx_rgemma.errors import CheckpointError, shortened
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.griffin.parameters import is_matrix
from mlx_rgemma.io.safetensors import TensorInfo

FLOATS = ("F32", "BF16", "F16")
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
PACKED = ("weight", "scales", "biases")
COMPARE_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorSpec:
    """A parameter of a model.

    Attributes:
        name: Hugging Face's name.
        shape: Shape in MLX's layout.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def matrix(self) -> bool:
        """True for matrices, which can be quantized."""
        return is_matrix(self.name)

    @property
    def path(self) -> str:
        """Path of its module."""
        return self.name.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ValidatedCheckpoint:
    """Contents of a complete checkpoint.

    Attributes:
        expected: Parameters of the model, in its order.
        quantized: Quantization of each quantized matrix, by the path of its module.
        redundant: Names of duplicate tensors: the LM head, which is the embedding.
    """

    expected: tuple[TensorSpec, ...]
    quantized: dict[str, Quantization]
    redundant: tuple[str, ...]


def expected_tensors(config: GriffinConfig) -> tuple[TensorSpec, ...]:
    """Return the parameters of a model, in its order. Nothing is computed or allocated."""
    from mlx.utils import tree_flatten

    from mlx_rgemma.griffin.model import Model

    parameters: Any = tree_flatten(Model(config).parameters())
    return tuple(TensorSpec(name, value.shape) for name, value in parameters)


def check_contents(folder: CheckpointFolder) -> ValidatedCheckpoint:
    """Validate the tensors of a checkpoint against its configuration.

    Raises:
        CheckpointError: Listing tensors that are missing, surplus, misshapen or of a wrong dtype;
            or naming an LM head that differs from the embedding.
    """
    config, tensors = folder.config, folder.tensors
    if config.num_hidden_layers > len(tensors):
        raise CheckpointError(
            f"{folder.path / CONFIG}: num_hidden_layers is {config.num_hidden_layers}, but the"
            f" weight files hold {len(tensors)} tensors in all."
        )
    expected = expected_tensors(config)
    problems = _Problems()
    unread = dict(tensors)
    quantized: dict[str, Quantization] = {}
    for wanted in expected:
        info = unread.pop(wanted.name, None)
        if info is None:
            problems.missing.append(wanted.name)
        elif wanted.matrix and f"{wanted.path}.scales" in unread:
            packed = [info, *(unread.pop(f"{wanted.path}.{p}", None) for p in PACKED[1:])]
            how = _quantization(folder, wanted, packed, problems)
            if how is not None:
                quantized[wanted.path] = how
        else:
            _check_dense(wanted, info, problems)
    redundant = tuple(f"{HEAD}.{part}" for part in PACKED if f"{HEAD}.{part}" in unread)
    problems.surplus += sorted(name for name in unread if name not in redundant)
    problems.refuse(folder)
    _check_head(tensors, redundant)
    return ValidatedCheckpoint(expected, quantized, redundant)


class _Problems:
    """Problems of a checkpoint, for one message."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.surplus: list[str] = []
        self.misshapen: list[str] = []
        self.wrong_dtype: list[str] = []
        self.unpackable: list[str] = []

    def refuse(self, folder: CheckpointFolder) -> None:
        kinds = {
            "missing": self.missing,
            "surplus": self.surplus,
            "misshapen": self.misshapen,
            "of the wrong dtype": self.wrong_dtype,
            "wrongly quantized": self.unpackable,
        }
        parts = [
            f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {kind}: {shortened(names)}"
            for kind, names in kinds.items()
            if names
        ]
        if parts:
            raise CheckpointError(
                f"{folder.path}: the weights do not fit {CONFIG}: {'; '.join(parts)}."
            )


def _check_dense(wanted: TensorSpec, info: TensorInfo, problems: _Problems) -> None:
    if info.dtype not in FLOATS:
        problems.wrong_dtype.append(f"{info.name} ({info.dtype}, expected {' or '.join(FLOATS)})")
    shapes = [wanted.shape]
    if wanted.name.endswith("conv_1d.weight"):
        channels, taps, one = wanted.shape
        shapes.append((channels, one, taps))  # Hugging Face's layout
    if info.shape not in shapes:
        problems.misshapen.append(
            f"{info.name} ({list(info.shape)}, expected {list(wanted.shape)})"
        )


def _quantization(
    folder: CheckpointFolder,
    wanted: TensorSpec,
    packed: list[TensorInfo | None],
    problems: _Problems,
) -> Quantization | None:
    """Return the quantization of a matrix, if its tensors and `config.json` agree."""
    weight, scales, biases = packed
    assert weight is not None and scales is not None
    found = Quantization.of_tensors(wanted.shape, weight, scales)
    if found is None:
        problems.unpackable.append(
            f"{wanted.path} (weight {weight.dtype} {list(weight.shape)}, scales {scales.dtype}"
            f" {list(scales.shape)}, for {list(wanted.shape)})"
        )
        return None
    actual = tuple((t.name, t.dtype, t.shape) for t in (weight, scales, biases) if t is not None)
    expected = found.packed(wanted.path, wanted.shape, scales.dtype)
    if actual != tuple((t.name, t.dtype, t.shape) for t in expected):
        problems.unpackable.append(f"{wanted.path} (its biases do not fit {found.mode})")
    section = folder.config.quantization
    if section is None:
        problems.unpackable.append(f"{wanted.path} ({CONFIG} has no 'quantization')")
    elif not agrees(found, section.get(wanted.path)):
        problems.unpackable.append(f"{wanted.path} (differs from {CONFIG})")
    return found


def _check_head(tensors: dict[str, TensorInfo], redundant: tuple[str, ...]) -> None:
    """Check that an LM head in the file is bit-identical to the embedding: they are tied."""
    for name in redundant:
        head = tensors[name]
        embedding = tensors.get(name.replace(HEAD, EMBEDDING, 1))
        if embedding is None or not same_bytes(head, embedding):
            remedy = (  # mlx-lm's mixed recipes give an LM head in the file more bits
                "; convert the unquantized model with mlx_rgemma.convert"
                if head.dtype == "U32"
                else ""
            )
            raise CheckpointError(
                f"{head.file}: {name} differs from {EMBEDDING}.weight; RecurrentGemma's LM head is"
                f" its embedding, another head is not supported{remedy}."
            )


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        remaining = a.nbytes
        while remaining:
            step = min(remaining, COMPARE_BYTES)
            if left.read(step) != right.read(step):
                return False
            remaining -= step
    return True
