"""Adapters in mlx-lm's format: configuration, loading and saving.

`adapter_config.json` has the layers and the kind of adapters; `adapters.safetensors` has the
trained weights. mlx-lm and this package load each other's folders, except for adapters on the
RG-LRU's gates, which mlx-lm does not know: fuse these first.
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
from mlx_rgemma.io.reading import is_integer, is_number, read_json, reason
from mlx_rgemma.io.safetensors import load_arrays, save_arrays

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_rgemma.griffin.model import Model

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
FINE_TUNE_TYPES = ("lora", "dora", "full")
FLOATS = ("float32", "bfloat16", "float16")
RUN = "run_digest"
"""Key of `adapter_config.json` and of the metadata of `adapters.safetensors`. If a run is killed
between writing the two, their values differ."""

MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 1 << 16
MAX_LAYERS = 1 << 16
MAX_SCALE = 1e6

OTHER_MODEL = "; the adapters were trained on another model, or in another way."


@dataclass(frozen=True)
class AdapterConfig:
    """Trained parameters, as in mlx-lm's `adapter_config.json`.

    Attributes:
        fine_tune_type: "lora", "dora" or "full" (the layers themselves).
        num_layers: Number of layers, from the last; -1 for all.
        rank, scale, dropout: Settings of the adapters.
        keys: Names within a layer of the linear layers that have adapters; None for all.
        gates: Whether the RG-LRU's gates have adapters too.
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
        """Read mlx-lm's keys.

        Args:
            values: The settings; other keys are ignored.
            where: Beginning of a message.

        Raises:
            UserError: Naming the first key that is missing or wrong.
        """

        def refuse(key: str, value: Any, expected: str) -> UserError:
            return UserError(f"{where}: {key} is {shown(value)}, expected {expected}.")

        kind = values.get("fine_tune_type", "lora")
        layers = values.get("num_layers", 16)
        gates = values.get("lora_gates") or False
        parameters = values.get("lora_parameters") or {}
        if kind not in FINE_TUNE_TYPES:
            raise refuse("fine_tune_type", kind, f"one of {', '.join(FINE_TUNE_TYPES)}")
        if not is_integer(layers, -1, MAX_LAYERS):
            raise refuse("num_layers", layers, f"an integer up to {MAX_LAYERS} (-1 for all)")
        if type(gates) is not bool:
            raise refuse("lora_gates", gates, "true or false")
        if kind == "full":
            if gates:
                raise UserError(
                    f"{where}: lora_gates: fine_tune_type full trains the gates anyway."
                )
            return cls(kind, layers)
        if not isinstance(parameters, Mapping):
            raise refuse("lora_parameters", parameters, "rank, scale and dropout")
        rank, dropout = parameters.get("rank", 8), parameters.get("dropout", 0.0)
        scale: Any = parameters.get("scale")
        keys: Any = parameters.get("keys")
        if not is_integer(rank, 1, MAX_RANK):
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
        """mlx-lm's `lora_parameters`."""
        values = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
        return {**values, "keys": list(self.keys)} if self.keys is not None else values


def add_adapters(model: Model, config: AdapterConfig) -> None:
    """Freeze a model, and add adapters or (fine_tune_type full) unfreeze its last layers.

    Raises:
        UserError: If the model has fewer layers, lacks a name, or does not support the settings.
    """
    _check_layers(model, config, "num-layers", "; -1 stands for all.")
    _check_rank(model, config)
    model.freeze()
    if config.fine_tune_type == "full":
        for layer in model.layers[-max(config.num_layers, 0) :]:
            layer.unfreeze()
            for module in layer.modules():
                if "scales" in module:  # quantized: integers have no gradient
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
        raise UserError(f"lora_parameters: {reason(error)}") from error
    if config.gates:
        add_gate_adapters(model, config.num_layers, config.rank, config.scale)


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """Return the configuration of the adapters in a folder, which must be complete.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    return _read_config(Path(folder).expanduser())[0]


def _read_config(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """Return the configuration in a folder, checked, and all values of its file."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a folder that lora wrote.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file; the adapters are incomplete.")
    file = folder / CONFIG_FILE
    values = read_json(file, MAX_CONFIG_BYTES)
    return AdapterConfig.of(values, str(file)), values


def load_adapters(model: Model, folder: str | os.PathLike[str]) -> AdapterConfig:
    """Load trained adapters into a model, in evaluation mode.

    Files, names, shapes and dtypes are checked before a weight is used. After an error the model
    cannot be used.

    Args:
        model: The model that the adapters were trained on.
        folder: Folder of `adapter_config.json` and `adapters.safetensors`.

    Returns:
        The configuration of the adapters.

    Raises:
        CheckpointError: If a file is missing, damaged, or of another model.
    """
    folder = Path(folder).expanduser()
    config, values = _read_config(folder)
    file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    weights, metadata = load_arrays(weights_file)
    if (run := metadata.get(RUN)) is not None and run != values.get(RUN):
        raise CheckpointError(
            f"{file}: of another run than {WEIGHTS_FILE} ({RUN} is {shown(values.get(RUN))} and"
            f" {shown(run)}); train again, or restore the matching file."
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
    """Load weights into the adapters of a model.

    Args:
        model: The model; its trainable parameters are the adapters.
        file: The weights, in safetensors.
        partial: Whether the file may lack some of them.

    Raises:
        CheckpointError: If the file is damaged or of another model.
    """
    path = Path(file).expanduser()
    _set_weights(model, path, load_arrays(path)[0], partial=partial)


def _set_weights(
    model: Model, path: Path, weights: dict[str, mx.array], *, partial: bool = False
) -> None:
    """Check weights against the trainable parameters of a model, then load them."""
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
    """Write `adapter_config.json` with all settings of a run, as mlx-lm does."""
    text = json.dumps(dict(sorted(values.items())), indent=4, ensure_ascii=False) + "\n"
    with atomic_file(folder / CONFIG_FILE) as partial:
        partial.write_text(text, encoding="utf-8")


def save_adapter_weights(
    file: Path, weights: Mapping[str, mx.array], run: str | None = None
) -> None:
    """Write the weights of adapters atomically; an earlier file is replaced.

    Args:
        file: The file.
        weights: The weights.
        run: The `RUN` of the configuration in the same folder.

    Raises:
        CheckpointError: If they cannot be written; an earlier file stays.
    """
    save_arrays(file, weights, {} if run is None else {RUN: run})


def _check_layers(model: Model, config: AdapterConfig, name: str, hint: str) -> None:
    if config.num_layers > len(model.layers):
        raise UserError(
            f"{name} is {config.num_layers}, but the model has {len(model.layers)} layers{hint}"
        )


def _check_rank(model: Model, config: AdapterConfig) -> None:
    """Refuse a rank above that of any matrix of the model."""
    args = model.args
    widest = max(args.hidden_size, args.lru_width, args.intermediate_size // 2)
    if config.fine_tune_type != "full" and config.rank > widest:
        raise UserError(
            f"lora_parameters.rank is {config.rank}, more than any matrix of the model needs"
            f" ({widest})."
        )


def _check_keys(model: Model, config: AdapterConfig) -> None:
    """Refuse unknown names, for which mlx-lm would silently train nothing."""
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
    """Refuse bits for which mlx-lm's DoRA computes a wrong width."""
    for name, module in model.named_modules():
        bits = getattr(module, "bits", None) if "scales" in module else None
        if bits is not None and 32 % bits:
            raise UserError(
                f"dora: {name} has {bits} bits, and DoRA takes 2, 4 or 8; use lora, or convert with"
                " --q-bits 4."
            )
