"""Trained adapters as mlx-lm keeps them: a folder with their weights and how they were made.

`adapter_config.json` says which layers have adapters; `adapters.safetensors` holds the weights (of
a model trained in full: all that was trained). A folder made here loads in mlx-lm and the other way
round, with one exception: adapters on the RG-LRU's gates are this package's own, so a model with
those is fused first.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rgemma.checkpoints.folder import read_json, shortened
from mlx_rgemma.checkpoints.safetensors import read_header
from mlx_rgemma.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_rgemma.griffin.model import Model

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
FINE_TUNE_TYPES = ("lora", "dora", "full")
FLOATS = ("F32", "BF16", "F16")

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
            return UserError(f"{where}: {key} is {value!r}, expected {expected}.")

        kind = values.get("fine_tune_type", "lora")
        layers = values.get("num_layers", 16)
        gates = values.get("lora_gates") or False
        parameters = values.get("lora_parameters") or {}
        if kind not in FINE_TUNE_TYPES:
            raise refuse("fine_tune_type", kind, f"one of {', '.join(FINE_TUNE_TYPES)}")
        if type(layers) is not int or layers < -1:
            raise refuse("num_layers", layers, "a whole number (-1 for all)")
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
        if type(rank) is not int or rank < 1:
            raise refuse("lora_parameters.rank", rank, "a whole number above 0")
        if scale is None and "alpha" in parameters:
            raise UserError(f"{where}: lora_parameters has alpha, expected scale (alpha / rank).")
        if not _is_number(scale):
            raise refuse("lora_parameters.scale", scale, "a number")
        if not _is_number(dropout) or not 0 <= dropout < 1:
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
    model.freeze()
    if config.fine_tune_type == "full":
        for layer in model.layers[-max(config.num_layers, 0) :]:
            layer.unfreeze()
            for module in layer.modules():
                if "scales" in module:  # quantized: there is no gradient of whole numbers
                    module.freeze(recurse=False)
        return
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_rgemma.griffin.gate_adapters import add_gate_adapters

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
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; adapters are what lora writes.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file; the adapters are incomplete.")
    file = folder / CONFIG_FILE
    return AdapterConfig.of(read_json(file), str(file))


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
    config = read_adapter_config(folder)
    folder = Path(folder).expanduser()
    file = folder / CONFIG_FILE
    _check_layers(model, config, f"{file}: num_layers", OTHER_MODEL)
    try:
        add_adapters(model, config)
    except UserError as error:
        raise CheckpointError(f"{file}: {error}") from error
    load_adapter_weights(model, folder / WEIGHTS_FILE)
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
    import mlx.core as mx
    from mlx.utils import tree_flatten

    path = Path(file).expanduser()
    found = read_header(path)
    trained: Any = tree_flatten(model.trainable_parameters())
    wanted = {name: value.shape for name, value in trained}
    unknown = [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    if unknown:
        raise CheckpointError(f"{path}: holds {shortened(unknown)}, unknown here{OTHER_MODEL}")
    if (missing and not partial) or not found:
        raise CheckpointError(f"{path}: lacks {shortened(missing)}{OTHER_MODEL}")
    for name, info in found.items():
        if info.shape != wanted[name]:
            raise CheckpointError(
                f"{path}: {name} has shape {info.shape}, the model needs {wanted[name]}"
                f"{OTHER_MODEL}"
            )
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {name} is {info.dtype}, expected {', '.join(FLOATS)}.")
    try:
        weights = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    model.load_weights(list(weights.items()), strict=False)  # type: ignore[union-attr]


def save_adapter_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`, with all settings of a run, as mlx-lm does."""
    text = json.dumps(dict(sorted(values.items())), indent=4, ensure_ascii=False) + "\n"
    path = folder / CONFIG_FILE
    _replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def save_adapter_weights(file: Path, weights: Mapping[str, mx.array]) -> None:
    """Write adapters over those before, in one step.

    Raises:
        CheckpointError: If they cannot be written; the file that was there stays.
    """
    import mlx.core as mx

    _replace(file, lambda partial: mx.save_safetensors(str(partial), dict(weights)))


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be written ({reason}).") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _check_layers(model: Model, config: AdapterConfig, name: str, hint: str) -> None:
    if config.num_layers > len(model.layers):
        raise UserError(
            f"{name} is {config.num_layers}, but the model has {len(model.layers)} layers{hint}"
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
