"""What a checkpoint should hold, by its configuration, and whether it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_rgemma.checkpoints.formats.huggingface import CONFIG, CheckpointFolder
from mlx_rgemma.checkpoints.quantization import Quantization, agrees
from mlx_rgemma.errors import CheckpointError, shortened
from mlx_rgemma.griffin.config import RECURRENT, GriffinConfig
from mlx_rgemma.io.safetensors import TensorInfo

FLOATS = ("F32", "BF16", "F16")
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
PACKED = ("weight", "scales", "biases")
COMPARE_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model has.

    Attributes:
        name: Hugging Face's name.
        shape: Its shape in MLX's layout.
        matrix: Whether it is the matrix of a projection or of the embedding: what may be
            quantized.
    """

    name: str
    shape: tuple[int, ...]
    matrix: bool = False

    @property
    def path(self) -> str:
        """The module that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ValidatedCheckpoint:
    """A checkpoint that holds all it should.

    Attributes:
        expected: The model's tensors, in the order of the model.
        quantized: How each quantized matrix is quantized, by the path of its module.
        redundant: Names of tensors that say again what others say: the tied head.
    """

    expected: tuple[TensorSpec, ...]
    quantized: dict[str, Quantization]
    redundant: tuple[str, ...]


def expected_tensors(config: GriffinConfig) -> Iterator[TensorSpec]:
    """The tensors of a model, in order, in MLX's layout."""
    width, lru, inner = config.hidden_size, config.lru_width, config.intermediate_size // 2
    heads, block = config.num_attention_heads, config.lru_width // config.num_attention_heads

    def linear(path: str, rows: int, columns: int, bias: bool = True) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{path}.weight", (rows, columns), matrix=True)
        if bias:
            yield TensorSpec(f"{path}.bias", (rows,))

    yield TensorSpec(f"{EMBEDDING}.weight", (config.vocab_size, width), matrix=True)
    for i, kind in enumerate(config.layer_types):
        layer = f"model.layers.{i}"
        temporal, mlp = f"{layer}.temporal_block", f"{layer}.mlp_block"
        yield TensorSpec(f"{layer}.temporal_pre_norm.weight", (width,))
        if kind == RECURRENT:
            yield from linear(f"{temporal}.linear_y", lru, width)
            yield from linear(f"{temporal}.linear_x", lru, width)
            yield from linear(f"{temporal}.linear_out", width, lru)
            yield TensorSpec(f"{temporal}.conv_1d.weight", (lru, config.conv1d_width, 1))
            yield TensorSpec(f"{temporal}.conv_1d.bias", (lru,))
            yield TensorSpec(f"{temporal}.rg_lru.recurrent_param", (lru,))
            for gate in ("input_gate", "recurrent_gate"):
                yield TensorSpec(f"{temporal}.rg_lru.{gate}_weight", (heads, block, block))
                yield TensorSpec(f"{temporal}.rg_lru.{gate}_bias", (heads, block))
        else:
            head, bias = config.head_dim, config.attention_bias
            yield from linear(f"{temporal}.q_proj", heads * head, width, bias)
            yield from linear(f"{temporal}.k_proj", head, width, bias)
            yield from linear(f"{temporal}.v_proj", head, width, bias)
            yield from linear(f"{temporal}.o_proj", width, heads * head)
        yield TensorSpec(f"{layer}.channel_pre_norm.weight", (width,))
        yield from linear(f"{mlp}.gate_proj", inner, width)
        yield from linear(f"{mlp}.up_proj", inner, width)
        yield from linear(f"{mlp}.down_proj", width, inner)
    yield TensorSpec("model.final_norm.weight", (width,))


def check_contents(folder: CheckpointFolder) -> ValidatedCheckpoint:
    """Compare a checkpoint's tensors with its configuration.

    Returns:
        What was found, once everything that should be there is, and nothing else.

    Raises:
        CheckpointError: Listing the tensors that are missing, surplus, misshapen or of a dtype
            that no weight can have, or naming a head that differs from the embedding.
    """
    config, tensors = folder.config, folder.tensors
    if config.num_hidden_layers > len(tensors):
        raise CheckpointError(
            f"{folder.path / CONFIG}: num_hidden_layers is {config.num_hidden_layers}, but the"
            f" weight files hold {len(tensors)} tensors in all."
        )
    expected = tuple(expected_tensors(config))
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
    """All that does not fit, for one message."""

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
    """How a matrix is quantized, if its tensors and `config.json` agree on that."""
    weight, scales, biases = packed
    assert weight is not None and scales is not None
    found = Quantization.of_tensors(wanted.shape, weight, scales)
    if found is None:
        problems.unpackable.append(
            f"{wanted.path} (weight {weight.dtype} {list(weight.shape)}, scales {scales.dtype}"
            f" {list(scales.shape)}, for {list(wanted.shape)})"
        )
        return None
    there = tuple((t.name, t.dtype, t.shape) for t in (weight, scales, biases) if t is not None)
    right = found.packed(wanted.path, wanted.shape, scales.dtype)
    if there != tuple((t.name, t.dtype, t.shape) for t in right):
        problems.unpackable.append(f"{wanted.path} (its biases do not fit {found.mode})")
    section = folder.config.quantization
    if section is None:
        problems.unpackable.append(f"{wanted.path} ({CONFIG} has no 'quantization')")
    elif not agrees(found, section.get(wanted.path)):
        problems.unpackable.append(f"{wanted.path} (not as {CONFIG} says)")
    return found


def _check_head(tensors: dict[str, TensorInfo], redundant: tuple[str, ...]) -> None:
    """A head on file must be the embedding, to the bit: it is tied."""
    for name in redundant:
        head = tensors[name]
        embedding = tensors.get(name.replace(HEAD, EMBEDDING, 1))
        if embedding is None or not same_bytes(head, embedding):
            remedy = (  # mlx-lm's mixed recipes give a head on file more bits
                "; convert the unquantized model with mlx_rgemma.convert"
                if head.dtype == "U32"
                else ""
            )
            raise CheckpointError(
                f"{head.file}: {name} differs from {EMBEDDING}.weight; RecurrentGemma's head is"
                f" its embedding, a model with another head is not supported{remedy}."
            )


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
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
