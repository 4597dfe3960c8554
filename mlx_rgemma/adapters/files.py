"""Trained adapters as mlx-lm keeps them: a folder with their weights and how they were made.

`adapter_config.json` says which layers have adapters; `adapters.safetensors` holds the weights (of
a model trained in full: all that was trained). A folder made here loads in mlx-lm and the other way
round, with one exception: adapters on the RG-LRU's gates are this package's own, so a model with
those is fused first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rgemma.errors import CheckpointError, UserError, shortened, shown
from mlx_rgemma.io.atomic import atomic_file
from mlx_rgemma.io.reading import read_json

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_rgemma.griffin.model import Model

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
FINE_TUNE_TYPES = ("lora", "dora", "full")
FLOATS = ("float32", "bfloat16", "float16")
RUN = "run_digest"
"""Key of `adapter_config.json` and of the metadata of `adapters.safetensors`. A run that is killed
between writing the two leaves files of two runs, which this tells apart."""

MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 1 << 16
MAX_LAYERS = 1 << 16
MAX_SCALE = 1e6

OTHER_MODEL = "; the adapters were trained on another model, or in another way."


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained, as in mlx-lm's `adapter_config.json`.

    Attributes:
        fine_tune_type: "lora", "dora" or "full" (the layers themselves).
        num_layers: How many layers, from the last; -1 for all.
        rank, scale, dropout: Of the adapters.
        keys: Names of the linear layers that have adapters, within a layer; None for all.
        gates: Whether the RG-LRU's gates have adapters, too.
    """

    fine_tune_type: str = "lora"
    num_layers: int = 16
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None
    gates: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> AdapterConfig:
        """From mlx-lm's keys.

        Args:
            values: They may hold other keys, too.
            where: What they came from, for messages.

        Raises:
            UserError: Naming the first that is missing or cannot be.
        """

        def refuse(key: str, value: Any, expected: str) -> UserError:
            return UserError(f"{where}: {key} is {shown(value)}, expected {expected}.")

        kind = values.get("fine_tune_type", "lora")
        layers = values.get("num_layers", 16)
        gates = values.get("lora_gates") or False
        parameters = values.get("lora_parameters") or {}
        if kind not in FINE_TUNE_TYPES:
            raise refuse("fine_tune_type", kind, f"one of {', '.join(FINE_TUNE_TYPES)}")
        if not is_whole(layers, -1, MAX_LAYERS):
            raise refuse("num_layers", layers, "an integer of layers (-1 for all)")
        if type(gates) is not bool:
            raise refuse("lora_gates", gates, "true or false")
        if kind == "full":
            if gates:
                raise UserError(f"{where}: lora_gates: full training trains the gates themselves.")
            return cls(kind, layers)
        if not isinstance(parameters, Mapping):
            raise refuse("lora_parameters", parameters, "rank, scale and dropout")
        rank, dropout = parameters.get("rank", 8), parameters.get("dropout", 0.0)
        scale: Any = parameters.get("scale")
        keys: Any = parameters.get("keys")
        if not is_whole(rank, 1, MAX_RANK):
            raise refuse("lora_parameters.rank", rank, f"an integer from 1 to {MAX_RANK}")
        if scale is None and "alpha" in parameters:
            raise UserError(f"{where}: lora_parameters has alpha, expected scale (alpha / rank).")
        if not is_number(scale, -MAX_SCALE, MAX_SCALE):
            raise refuse("lora_parameters.scale", scale, f"a number up to {MAX_SCALE:g}")
        if not is_number(dropout, 0, 1) or dropout == 1:
            raise refuse("lora_parameters.dropout", dropout, "a number from 0 to less than 1")
        if keys is not None and not (
            isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        ):
            raise refuse("lora_parameters.keys", keys, "a list of names")
        return cls(kind, layers, rank, scale, dropout, None if keys is None else tuple(keys), gates)

    @property
    def lora_parameters(self) -> dict[str, Any]:
        """As mlx-lm has them."""
        values = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
        return {**values, "keys": list(self.keys)} if self.keys is not None else values


def add_adapters(model: Model, config: AdapterConfig) -> None:
    """Freeze a model but for what is to be trained: new adapters, or (in full) its last layers.

    Raises:
        UserError: If the model has fewer layers, or none of the names, or cannot be trained so.
    """
    _check_layers(model, config, "num-layers", "; -1 stands for all.")
    _check_rank(model, config)
    model.freeze()
    if config.fine_tune_type == "full":
        for layer in model.layers[-max(config.num_layers, 0) :]:
            layer.unfreeze()
            for module in layer.modules():
                if "scales" in module:  # quantized: there is no gradient of integers
                    module.freeze(recurse=False)
        return
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_rgemma.adapters.gates import add_gate_adapters

    _check_keys(model, config)
    if config.fine_tune_type == "dora":
        _check_dora(model)
    try:
        linear_to_lora_layers(
            model,
            config.num_layers,
            config.lora_parameters,
            use_dora=config.fine_tune_type == "dora",
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"lora_parameters: {' '.join(str(error).split())}") from error
    if config.gates:
        add_gate_adapters(model, config.num_layers, config.rank, config.scale)


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """How the adapters in a folder were made; what it takes to use them is there.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    return _read_config(Path(folder).expanduser())[0]


def _read_config(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """Return the configuration in a folder, checked, and all values of its file."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; adapters are what lora writes.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file; the adapters are incomplete.")
    file = folder / CONFIG_FILE
    if (size := file.stat().st_size) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file}: {size} bytes, expected at most {MAX_CONFIG_BYTES}.")
    values = read_json(file)
    return AdapterConfig.of(values, str(file)), values


def load_adapters(model: Model, folder: str | os.PathLike[str]) -> AdapterConfig:
    """Put trained adapters on a model, in evaluation mode.

    Everything is checked before a weight is read: that both files are there and sound, and that the
    weights are those of such adapters on this very model. After an error the model is of no use.

    Args:
        model: The model that they were trained on.
        folder: With `adapter_config.json` and `adapters.safetensors`.

    Returns:
        How they were made.

    Raises:
        CheckpointError: If anything is missing, damaged, or of another model.
    """
    folder = Path(folder).expanduser()
    config, values = _read_config(folder)
    file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    weights, metadata = _read_weights(weights_file)
    if (run := metadata.get(RUN)) is not None and run != values.get(RUN):
        raise CheckpointError(
            f"{file}: of another run than {WEIGHTS_FILE} ({RUN} is {shown(values.get(RUN))} and"
            f" {shown(run)}); train again, or put back the file that belongs to it."
        )
    _check_layers(model, config, f"{file}: num_layers", OTHER_MODEL)
    try:
        add_adapters(model, config)
    except UserError as error:
        raise CheckpointError(f"{file}: {error}") from error
    _set_weights(model, weights_file, weights)
    model.freeze()
    model.eval()
    return config


def load_adapter_weights(
    model: Model, file: str | os.PathLike[str], *, partial: bool = False
) -> None:
    """Give the adapters of a model their weights.

    Args:
        model: Its trainable parameters are the adapters.
        file: The weights, in safetensors.
        partial: Whether the file may lack some of them.

    Raises:
        CheckpointError: If the file is damaged or of another model.
    """
    path = Path(file).expanduser()
    _set_weights(model, path, _read_weights(path)[0], partial=partial)


def _read_weights(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    from mlx_rgemma.io.arrays import load_arrays

    return load_arrays(path)


def _set_weights(
    model: Model, path: Path, weights: dict[str, mx.array], *, partial: bool = False
) -> None:
    """Check weights against the trainable parameters of a model before it gets them."""
    from mlx.utils import tree_flatten

    trained: Any = tree_flatten(model.trainable_parameters())
    wanted = {name: value.shape for name, value in trained}
    unknown = [name for name in weights if name not in wanted]
    missing = [name for name in wanted if name not in weights]
    if unknown:
        raise CheckpointError(f"{path}: holds {shortened(unknown)}, unknown here{OTHER_MODEL}")
    if (missing and not partial) or not weights:
        raise CheckpointError(f"{path}: lacks {shortened(missing)}{OTHER_MODEL}")
    for name, value in weights.items():
        if value.shape != wanted[name]:
            raise CheckpointError(
                f"{path}: {name} has shape {value.shape}, the model needs {wanted[name]}"
                f"{OTHER_MODEL}"
            )
        if (dtype := str(value.dtype).removeprefix("mlx.core.")) not in FLOATS:
            raise CheckpointError(f"{path}: {name} is {dtype}, expected {', '.join(FLOATS)}.")
    model.load_weights(list(weights.items()), strict=False)


def save_adapter_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`, with all settings of a run, as mlx-lm does."""
    text = json.dumps(dict(sorted(values.items())), indent=4, ensure_ascii=False) + "\n"
    with atomic_file(folder / CONFIG_FILE) as partial:
        partial.write_text(text, encoding="utf-8")


def save_adapter_weights(
    file: Path, weights: Mapping[str, mx.array], run: str | None = None
) -> None:
    """Write adapters over those before, in one step.

    Args:
        file: The file.
        weights: The weights.
        run: The `RUN` of the configuration beside it.

    Raises:
        CheckpointError: If they cannot be written; the file that was there stays.
    """
    from mlx_rgemma.io.arrays import save_arrays

    save_arrays(file, weights, {} if run is None else {RUN: run})


def _check_layers(model: Model, config: AdapterConfig, name: str, hint: str) -> None:
    if config.num_layers > len(model.layers):
        raise UserError(
            f"{name} is {config.num_layers}, but the model has {len(model.layers)} layers{hint}"
        )


def _check_rank(model: Model, config: AdapterConfig) -> None:
    """Refuse adapters that are larger than any matrix of the model."""
    args = model.args
    widest = max(args.hidden_size, args.lru_width, args.intermediate_size // 2)
    if config.fine_tune_type != "full" and config.rank > widest:
        raise UserError(
            f"lora_parameters.rank is {config.rank}, more than any matrix of the model needs"
            f" ({widest})."
        )


def _check_keys(model: Model, config: AdapterConfig) -> None:
    """Refuse names that no linear layer has: mlx-lm would train nothing, and not say so."""
    if config.keys is None:
        return
    names = {name for layer in model.layers for name, _ in layer.named_modules()}
    names |= {name for name, _ in model.named_modules()}
    unknown = [key for key in config.keys if key not in names]
    if unknown or not config.keys:
        raise UserError(
            f"lora_parameters.keys: the model has no {shortened(unknown) or 'empty list'}; layers"
            " have temporal_block.linear_x, temporal_block.q_proj, mlp_block.up_proj and the like."
        )


def _check_dora(model: Model) -> None:
    """Refuse bits that mlx-lm's DoRA miscounts the width of a matrix with."""
    for name, module in model.named_modules():
        bits = getattr(module, "bits", None) if "scales" in module else None
        if bits is not None and 32 % bits:
            raise UserError(
                f"dora: {name} has {bits} bits, and DoRA takes 2, 4 or 8; use lora, or convert with"
                " --q-bits 4."
            )


def is_number(value: Any, minimum: float, maximum: float) -> bool:
    """Whether a value is a number of a range, and not NaN, true or false."""
    return type(value) in (int, float) and minimum <= value <= maximum


def is_whole(value: Any, minimum: int, maximum: int) -> bool:
    """Whether a value is an integer of a range."""
    return type(value) is int and minimum <= value <= maximum
