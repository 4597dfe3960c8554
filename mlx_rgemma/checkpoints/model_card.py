"""The README.md of a folder that this package wrote: a model card, as the Hub reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_rgemma import __version__
from mlx_rgemma.checkpoints.source import Source

MODEL_CARD = "README.md"
RELEASED = re.compile(r"recurrentgemma-(2b|9b)(-it)?", re.IGNORECASE)
"""Names of the released models, whose publisher and licence are known."""


def write_model_card(folder: Path, source: Source | None, how: str) -> None:
    """Write the model card of a checkpoint.

    What the card of the source says (its licence, languages, tags, the model that it is based on)
    is kept.

    Args:
        folder: The folder that holds the new checkpoint.
        source: Where the model came from, if it was converted.
        how: One sentence on how it was made.
    """
    from huggingface_hub import ModelCardData

    stated = _stated(source)
    tags = stated.pop("tags", None)
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    stated |= {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*tags, "mlx", "recurrent_gemma"])),
    }
    name = folder_title(source)
    if source is not None and source.repository is not None:
        stated["base_model"] = source.repository
    elif source is not None and RELEASED.fullmatch(source.name):
        stated.setdefault("base_model", f"google/{source.name.lower()}")
    if RELEASED.fullmatch(str(stated.get("base_model", "")).rpartition("/")[2]):
        stated.setdefault("license", "gemma")
    text = f"""---
{ModelCardData(**stated).to_yaml()}
---

# {name}

A RecurrentGemma (Griffin) model in MLX's format. {how}
Made with mlx-rgemma {__version__}.

```shell
pip install mlx-rgemma
mlx_rgemma.generate --model <this folder> --prompt "Once upon a time"
```

```python
from mlx_rgemma import generate, load

model, tokenizer = load("<this folder>")
print(generate(model, tokenizer, "Once upon a time"))
```

Plain `mlx_lm` reads the same files: `mlx_lm.generate --model <this folder>`.
"""
    (folder / MODEL_CARD).write_text(text, encoding="utf-8")


def folder_title(source: Source | None) -> str:
    """What to call a model that came from `source`."""
    return f"{source.name}, converted to MLX" if source is not None else "RecurrentGemma in MLX"


def _stated(source: Source | None) -> dict[str, Any]:
    """The metadata of the source's own card, as far as there is one that can be read."""
    from huggingface_hub import ModelCard

    if source is None:
        return {}
    card = source.folder / MODEL_CARD
    origin = card if card.is_file() else source.repository
    if origin is None:
        return {}
    try:
        return ModelCard.load(origin).data.to_dict()
    except Exception:  # a card is welcome, but nothing depends on it
        return {}
