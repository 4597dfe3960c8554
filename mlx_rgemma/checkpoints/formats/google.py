"""Google's checkpoints: names, layouts, and settings that are missing in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.schema import FLOATS, TensorSpec, expected_tensors
from mlx_rgemma.errors import CheckpointError, ConfigError, shortened
from mlx_rgemma.griffin.config import ATTENTION, PRESETS, RECURRENT, GriffinConfig
from mlx_rgemma.griffin.parameters import A_PARAM, MODULES, Role
from mlx_rgemma.io.safetensors import MLX_NAME, TensorInfo

RG_LRU_NAMES = {
    A_PARAM: "a_param",
    "input_gate_weight": "input_gate.w",
    "input_gate_bias": "input_gate.b",
    "recurrent_gate_weight": "a_gate.w",
    "recurrent_gate_bias": "a_gate.b",
}
"""Google's names of the RG-LRU's parameters."""

BLOCK = re.compile(r"blocks\.(\d{1,6})\.")
LAYER = re.compile(r"model\.layers\.(\d+)\.")
OPTION = {
    "attention_window_size": "--attention-window-size",
    "logits_soft_cap": "--logits-soft-cap",
    "embeddings_scale_by_sqrt_dim": "--embeddings-scale or --no-embeddings-scale",
}
"""Options of `convert` for settings that are missing in Google's formats."""


@dataclass(frozen=True)
class ConfigOverrides:
    """Settings that are missing in Google's formats, from the user; None if not given.

    Attributes:
        attention_window_size: W, the past keys that a query sees.
        logits_soft_cap: Soft cap of the logits; 0 for none.
        embeddings_scale_by_sqrt_dim: Whether embeddings are multiplied by sqrt(hidden_size).
    """

    attention_window_size: int | None = None
    logits_soft_cap: float | None = None
    embeddings_scale_by_sqrt_dim: bool | None = None

    @property
    def provided(self) -> dict[str, Any]:
        """The settings that are given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class Store(Protocol):
    """Tensors by Google's names: a `TorchFile` or an `OrbaxFolder`.

    Attributes:
        path: The file or folder.
        tensors: Name, dtype and shape of each.
        transposed_kernels: Whether weights of linear layers are (in, out) and named `kernel`.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    transposed_kernels: bool

    def read(self, name: str, part: int | None = None) -> np.ndarray[Any, Any]: ...


@dataclass(frozen=True)
class Place:
    """Place of a parameter in Google's formats.

    Attributes:
        name: Google's name.
        shape: Google's shape.
        part: Index along the first axis, if Google stacks several parameters.
        transposed: Whether Google's axes are reversed.
    """

    name: str
    shape: tuple[int, ...]
    part: int | None = None
    transposed: bool = False


def place(wanted: TensorSpec, transposed_kernels: bool) -> Place:
    """Return the place of a parameter in Google's formats."""
    path, _, kind = wanted.name.rpartition(".")
    layer = LAYER.match(path)
    block = f"blocks.{layer[1]}." if layer is not None else ""
    shape, module = wanted.shape, MODULES[path.rpartition(".")[2]]
    name = block + module.google
    if module.role is Role.EMBEDDING:
        return Place(name, shape)
    if module.role is Role.NORM:
        return Place(f"{name}.scale", shape)
    if module.role is Role.RG_LRU:
        return Place(f"{name}.{RG_LRU_NAMES[kind]}", shape)
    if module.role is Role.CONV:
        return (
            Place(f"{name}.b", shape)
            if kind == "bias"
            else Place(f"{name}.w", shape[1::-1], None, True)
        )
    if module.google_index is not None:
        if kind == "bias":
            return Place(f"{name}.b", (2, 1, 1, *shape), module.google_index)
        return Place(f"{name}.w", (2, *shape[::-1]), module.google_index, True)
    if kind == "weight" and transposed_kernels:
        return Place(f"{name}.kernel", shape[::-1], None, True)
    return Place(f"{name}.{kind}", shape)


def open_google(
    store: Store, overrides: ConfigOverrides
) -> tuple[CheckpointFolder, str | None, str]:
    """Open a checkpoint of Google's with Hugging Face's names, shapes and configuration.

    Returns:
        The checkpoint; the released model of its shape, if any; and a note on the origin of the
        missing settings.

    Raises:
        CheckpointError: If tensors are missing, surplus or misshapen, or settings are missing in
            `overrides` and the shape is not a released one.
    """
    shape = _Shape(store).config()
    config, released, note = _complete(store, shape, overrides)
    expected = expected_tensors(config)
    places = {wanted.name: place(wanted, store.transposed_kernels) for wanted in expected}
    _check(store, places)
    tensors = {
        wanted.name: TensorInfo(
            wanted.name, store.tensors[places[wanted.name].name].dtype, wanted.shape, store.path
        )
        for wanted in expected
    }

    def read(name: str) -> mx.array:
        there, info = places[name], tensors[name]
        value = mx.array(store.read(there.name, there.part))
        value = value.view(getattr(mx, MLX_NAME[info.dtype]))
        return (mx.contiguous(value.T) if there.transposed else value).reshape(info.shape)

    return CheckpointFolder(store.path, {}, config, tensors, read), released, note


def _check(store: Store, places: Mapping[str, Place]) -> None:
    """Validate the tensors, by Google's names."""
    wanted = {there.name: there.shape for there in places.values()}
    problems = {
        "missing": [name for name in wanted if name not in store.tensors],
        "surplus": sorted(name for name in store.tensors if name not in wanted),
        "misshapen": [
            f"{name} ({list(info.shape)}, expected {list(wanted[name])})"
            for name, info in store.tensors.items()
            if name in wanted and info.shape != wanted[name]
        ],
        "of the wrong dtype": [
            f"{name} ({info.dtype}, expected {' or '.join(FLOATS)})"
            for name, info in store.tensors.items()
            if name in wanted and info.dtype not in FLOATS
        ],
    }
    parts = [
        f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {kind}: {shortened(names)}"
        for kind, names in problems.items()
        if names
    ]
    if parts:
        raise CheckpointError(f"{store.path}: not a whole RecurrentGemma: {'; '.join(parts)}.")


class _Shape:
    """Sizes of a model, inferred from the shapes of its tensors."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.matrix = "kernel" if store.transposed_kernels else "weight"
        numbers = {int(found[1]) for name in store.tensors if (found := BLOCK.match(name))}
        if not numbers or numbers != set(range(len(numbers))):
            raise CheckpointError(
                f"{store.path}: not a whole RecurrentGemma:"
                f" {'no blocks' if not numbers else f'blocks missing below {max(numbers)}'}."
            )
        self.layers = len(numbers)

    def config(self) -> GriffinConfig:
        """Return the configuration, without settings that shapes do not determine."""
        vocabulary, width = self._sizes("embedder.input_embedding", 2)
        _, _, inner = self._sizes("blocks.0.mlp_block.ffw_up.w", 3)
        types = [self._type(i) for i in range(self.layers)]
        lru, taps, heads, head = width, 4, 0, 0
        if RECURRENT in types:
            block = f"blocks.{types.index(RECURRENT)}.recurrent_block"
            taps, lru = self._sizes(f"{block}.conv_1d.w", 2)
            heads, _, _ = self._sizes(f"{block}.rg_lru.a_gate.w", 3)
        if ATTENTION in types:
            block = f"blocks.{types.index(ATTENTION)}.attention_block"
            head, _ = self._rows(f"{block}.proj_k")
            rows, _ = self._rows(f"{block}.proj_q")
            heads = heads or rows // max(1, head)
        heads = heads or 1
        try:
            return GriffinConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=2 * inner,
                num_hidden_layers=self.layers,
                num_attention_heads=heads,
                head_dim=head or width // heads,
                lru_width=lru,
                attention_window_size=1,
                block_types=_cycle(types),
                conv1d_width=taps,
                dtype=self._dtype(),
            )
        except ConfigError as error:
            raise CheckpointError(f"{self.store.path}: no RecurrentGemma: {error}") from error

    def _dtype(self) -> str | None:
        return MLX_NAME.get(self.store.tensors["embedder.input_embedding"].dtype)

    def _sizes(self, name: str, dimensions: int) -> tuple[int, ...]:
        info = self.store.tensors.get(name)
        if info is None or len(info.shape) != dimensions:
            what = "missing" if info is None else f"{list(info.shape)}"
            raise CheckpointError(f"{self.store.path}: not a whole RecurrentGemma: {name} {what}.")
        return info.shape

    def _rows(self, linear: str) -> tuple[int, ...]:
        sizes = self._sizes(f"{linear}.{self.matrix}", 2)
        return sizes[::-1] if self.store.transposed_kernels else sizes

    def _type(self, number: int) -> str:
        prefixes = {RECURRENT: "recurrent_block.", ATTENTION: "attention_block."}
        found = [
            kind
            for kind, prefix in prefixes.items()
            if any(name.startswith(f"blocks.{number}.{prefix}") for name in self.store.tensors)
        ]
        if len(found) != 1:
            kinds = "both recurrent and" if found else "neither recurrent nor"
            raise CheckpointError(
                f"{self.store.path}: not a whole RecurrentGemma: block {number} is {kinds}"
                " attention."
            )
        return found[0]


def _cycle(types: list[str]) -> tuple[str, ...]:
    """Return the shortest list of blocks whose repetition gives all of them."""
    for length in range(1, len(types)):
        if all(types[i] == types[i % length] for i in range(len(types))):
            return tuple(types[:length])
    return tuple(types)


def _complete(
    store: Store, shape: GriffinConfig, overrides: ConfigOverrides
) -> tuple[GriffinConfig, str | None, str]:
    """Add the missing settings: from the released model of that shape, or the user."""
    stated = overrides.provided
    for name, released in PRESETS.items():
        known = {key: getattr(released, key) for key in OPTION}
        if replace(shape, **known, dtype=released.dtype) == released:
            config = _stated(store, shape, {**known, **stated})
            where = f"the shape is that of the released {name.upper()}"
            return config, name, f"{_values(config)}: {where}{_by_option(stated)}."
    absent = [option for key, option in OPTION.items() if key not in stated]
    if absent:
        raise CheckpointError(
            f"{store.path}: not of the shape of a released model ({shape.num_hidden_layers} layers,"
            f" {shape.hidden_size} wide), and its format does not hold the attention window, the"
            f" soft cap and the embedding scale: give {', '.join(absent)}."
        )
    config = _stated(store, shape, stated)
    return config, None, f"{_values(config)}: from the options."


def _stated(store: Store, shape: GriffinConfig, values: dict[str, Any]) -> GriffinConfig:
    try:
        return replace(shape, **values)
    except ConfigError as error:
        raise CheckpointError(f"{store.path}: {error}") from error


def _values(config: GriffinConfig) -> str:
    cap = f"soft cap {config.logits_soft_cap:g}" if config.logits_soft_cap else "no soft cap"
    scaled = "scaled" if config.embeddings_scale_by_sqrt_dim else "not scaled"
    return f"Attention window {config.attention_window_size}, {cap}, embeddings {scaled}"


def _by_option(stated: Mapping[str, Any]) -> str:
    return f", but for {', '.join(_options(stated))}" if stated else ""


def _options(stated: Mapping[str, Any]) -> Iterator[str]:
    for name in stated:
        yield OPTION[name].split(" ")[0]
