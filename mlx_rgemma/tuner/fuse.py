"""Fusing adapters into the weights of their model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_rgemma.adapters.files import CONFIG_FILE, load_adapters
from mlx_rgemma.checkpoints.convert import convert
from mlx_rgemma.checkpoints.formats.huggingface import CONFIG
from mlx_rgemma.checkpoints.load import load_model
from mlx_rgemma.checkpoints.quantization import Quantization
from mlx_rgemma.checkpoints.save import save_model
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.io.atomic import refuse_existing, scratch_directory
from mlx_rgemma.io.hub import locate
from mlx_rgemma.io.reading import read_json


@dataclass(frozen=True)
class Quantize:
    """Arguments of `convert -q`; None for its defaults."""

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"


def fuse_checkpoint(
    model: str | None,
    adapter_path: str,
    save_path: str,
    *,
    dequantize: bool = False,
    quantize: Quantize | None = None,
    progress: bool = False,
) -> list[str]:
    """Write a model with its adapters fused; quantized layers stay quantized.

    Args:
        model: Folder or repository of the adapters' model; None for the embedded model.
        adapter_path: Folder of the adapters.
        save_path: The new folder, which plain mlx-lm can run; it must not exist.
        dequantize: Dequantize all layers.
        quantize: Quantize the fused model, which must not be quantized, as `convert` does.
        progress: Show a progress bar.

    Returns:
        Notes for the user, one line each.

    Raises:
        UserError: If the model or the adapters do not fit; nothing is written.
    """
    target = Path(save_path).expanduser()
    refuse_existing(target)
    source = locate(model)
    written = read_json(source.folder / CONFIG)
    # In the dtype of the file, on a CPU too: only low-rank matrices are multiplied.
    stored = written.get("dtype") or written.get("torch_dtype") or "float32"
    fused, config = load_model(model, dtype=stored, lazy=True)
    if quantize is not None:
        Quantization.choose(quantize.mode, quantize.bits, quantize.group_size)  # before any work
        if config.quantization is not None and not dequantize:
            raise UserError("the model is quantized already; add --dequantize to requantize it.")
    load_adapters(fused, adapter_path)
    fuse_adapters(fused, dequantize=dequantize)
    options: dict[str, Any] = {"source": source.folder, "progress": progress}
    if quantize is None:
        save_model(target, fused, dtype=getattr(mx, stored), **options)
    else:
        with scratch_directory(target) as folder:
            plain = folder / "fused"
            save_model(plain, fused, dtype=getattr(mx, stored), **options)
            convert(
                plain,
                target,
                quantize=True,
                q_bits=quantize.bits,
                q_group_size=quantize.group_size,
                q_mode=quantize.mode,
                progress=progress,
            )
    trained = read_json(Path(adapter_path).expanduser() / CONFIG_FILE).get("model")
    if trained is not None and trained != model:
        return [f"the adapters were trained on {trained}."]
    return []


def fuse_adapters(model: Model, *, dequantize: bool = False) -> None:
    """Fuse the adapters of all layers into their weights.

    Args:
        model: The model; changed in place.
        dequantize: Dequantize all layers.
    """
    adapted = [(n, m) for n, m in model.named_modules() if hasattr(m, "fuse")]
    fused = [(name, module.fuse(dequantize=dequantize)) for name, module in adapted]
    if fused:
        model.update_modules(tree_unflatten(fused))
    if dequantize:
        from mlx_lm.utils import dequantize_model

        dequantize_model(model)
