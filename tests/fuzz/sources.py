"""The undamaged files: a tiny chat model and what the commands make of it.

`python -m fuzz.sources FOLDER` builds them in a process of its own.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

from fuzz.commands import child_environment

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 16,
    "lru_width": 32,
    "attention_window_size": 16,
}
LORA = ["--num-layers", "-1", "--batch-size", "2", "--max-seq-length", "64", "--val-batches", "1"]
TRAIN = [
    *("--vocab-size", "200", "--hidden-size", "32", "--num-hidden-layers", "3"),
    *("--num-attention-heads", "2", "--attention-window-size", "16", "--context-length", "32"),
    *("--batch-size", "2", "--warmup", "1", "--steps-per-eval", "100", "--sample-tokens", "2"),
]
DONE = "done"


def sources(folder: Path) -> Path:
    """Build the sources in a folder, once for all processes that share it.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / DONE).exists():
            subprocess.run(
                [sys.executable, "-m", "fuzz.sources", str(folder)],
                check=True,
                env=child_environment(),
                stdout=subprocess.DEVNULL,
                timeout=600,
            )
    return folder


def build(folder: Path) -> None:
    """Build all of them."""
    from helpers.checkpoint_files import GEMMA_LIKE, STORIES, train_sentencepiece
    from helpers.random_models import random_model

    from mlx_rgemma import GriffinConfig, Session, cache_prompt, convert, load, lora, train
    from mlx_rgemma.checkpoints.save import save_model

    raw, tiny = folder / "raw-it", folder / "tiny"
    raw.mkdir()
    train_sentencepiece(raw / "tokenizer.model", **GEMMA_LIKE)
    from mlx_rgemma.tokenizers.load import load_tokenizer

    config = GriffinConfig(vocab_size=len(load_tokenizer(raw)), **SHAPE)
    save_model(tiny, random_model(config=config), source=raw)
    convert(tiny, folder / "quantized", quantize=True, q_bits=4, q_group_size=32)

    model, tokenizer = load(tiny)
    session = Session(model, tokenizer)
    session.feed("One day Lily met a dog.")
    session.save(folder / "session.safetensors")
    (folder / "named").mkdir()
    session.save(folder / "named" / "book")

    data, texts = folder / "data", folder / "texts"
    data.mkdir()
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(STORIES))
    rows = [{"prompt": f"Who is {n}?", "completion": f"It is {n}."} for n in ("Ann", "Ben", "Cid")]
    for split in ("train", "valid", "test"):
        (data / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def run(command: object, *arguments: object) -> None:
        status = command.main([str(a) for a in arguments])  # type: ignore[attr-defined]
        assert status == 0, arguments

    cached = folder / "cache.safetensors"
    run(cache_prompt, "--model", tiny, "-p", "A cat.", "--prompt-cache-file", cached)
    run(
        lora,
        "--model",
        tiny,
        "--train",
        "--data",
        data,
        "--iters",
        2,
        "--adapter-path",
        folder / "adapters",
        *LORA,
    )
    run(train, "--data", texts, "--save-path", folder / "run", "--iters", 2, *TRAIN)
    (folder / DONE).touch()


if __name__ == "__main__":
    build(Path(sys.argv[1]))
