"""Model cards (README.md) of written folders, with the Hub's metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_rgemma import __version__
from mlx_rgemma.griffin.config import ATTENTION, GriffinConfig
from mlx_rgemma.io.hub import Source
from mlx_rgemma.io.reading import read_limited

MODEL_CARD = "README.md"
MAX_CARD_BYTES = 1_000_000
MAX_FRONT_MATTER = 50_000

THIS_FOLDER = "<this folder>"
"""Placeholder for the model's name until it is uploaded."""

FRONT_MATTER = re.compile(r"---\r?\n(?P<yaml>.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
RELEASED = re.compile(r"recurrentgemma-(2b|9b)(-it)?", re.IGNORECASE)
"""Names of the released models, whose license is known."""


def write_model_card(folder: Path, source: Source | None, how: str, config: GriffinConfig) -> None:
    """Write the model card of a checkpoint, with the metadata of its source's card.

    Args:
        folder: Folder of the new checkpoint.
        source: Source of the model, if it was converted.
        how: One sentence about the stored weights.
        config: Configuration of the model.
    """
    import yaml  # type: ignore[import-untyped]

    stated = _stated(source)
    tags = stated.pop("tags", [])
    tags = [tag for tag in (tags if isinstance(tags, list) else [tags]) if isinstance(tag, str)]
    stated |= {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*tags, "mlx", "recurrent_gemma"])),
    }
    name = f"{source.name} in MLX" if source is not None else "RecurrentGemma in MLX"
    if source is not None and source.repository is not None:
        stated["base_model"] = source.repository
    elif source is not None and RELEASED.fullmatch(source.name):
        stated.setdefault("base_model", f"google/{source.name.lower()}")
    if RELEASED.fullmatch(str(stated.get("base_model", "")).rpartition("/")[2]):
        stated.setdefault("license", "gemma")
    header = yaml.safe_dump(stated, sort_keys=False, allow_unicode=True)
    text = f"""---
{header}---

# {name}

A RecurrentGemma (Griffin) model in MLX's format. {how}
Made with mlx-rgemma {__version__}.

```shell
pip install git+https://github.com/mlx-rgemma/mlx-rgemma
mlx_rgemma.generate --model <this folder> --prompt "Once upon a time"
```

```python
from mlx_rgemma import generate, load

model, tokenizer = load("<this folder>")
print(generate(model, tokenizer, "Once upon a time"))
```

{_in_mlx_lm(config)}
"""
    (folder / MODEL_CARD).write_text(text, encoding="utf-8")


def ignored_by_mlx_lm(config: GriffinConfig) -> list[str]:
    """Return the settings of a model that plain mlx-lm ignores."""
    width, heads = config.hidden_size, config.num_attention_heads
    limits = {
        "it takes lru_width to be hidden_size": config.lru_width != width,
        "it takes head_dim to be hidden_size / heads": config.head_dim * heads != width,
        "its rotary base is 10000": config.rope_theta != 10000.0,
        "it rotates half of each head": config.partial_rotary_factor != 0.5,
        "its conv1d_width is 4": config.conv1d_width != 4,
        "it has no attention biases": config.attention_bias,
        "it needs an attention layer": ATTENTION not in config.block_types,
    }
    return [what for what, applies in limits.items() if applies]


def _in_mlx_lm(config: GriffinConfig) -> str:
    ignored = ignored_by_mlx_lm(config)
    if ignored:
        return f"Plain `mlx_lm` cannot run this model: {', '.join(ignored)}."
    return "Plain `mlx_lm` reads the same files: `mlx_lm.generate --model <this folder>`."


def _stated(source: Source | None) -> dict[str, Any]:
    """Return the metadata of the source's card, if there is one that can be read."""
    from huggingface_hub import hf_hub_download

    if source is None:
        return {}
    card = source.folder / MODEL_CARD
    try:
        if source.repository is not None and not card.is_file():
            card = Path(hf_hub_download(source.repository, MODEL_CARD))
        text = read_limited(card, MAX_CARD_BYTES).decode("utf-8")
        header = FRONT_MATTER.match(text)
        return {} if header is None else _front_matter(header["yaml"])
    except Exception:  # the card is optional
        return {}


def _front_matter(text: str) -> dict[str, Any]:
    from mlx_rgemma.io.yaml import parse_yaml

    return parse_yaml(text, MODEL_CARD) if len(text) <= MAX_FRONT_MATTER else {}
