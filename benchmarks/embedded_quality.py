"""Quality of the embedded model in each precision: `python -m benchmarks.embedded_quality`.

Prints the table of the model's card, on stories that no model was trained on. Everything is
computed in float32 from the stored weights, unless the row says otherwise.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rgemma import convert, load

TEXT = Path(__file__).parents[1] / "tests" / "checkpoints" / "unseen_stories.txt"
STORIES = TEXT.read_text().strip().split("\n\n")

CANDIDATES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bf16": {},
    **{
        f"{bits} bits, groups of {group}": {
            "quantize": True,
            "q_bits": bits,
            "q_group_size": group,
        }
        for bits in (8, 6, 5, 4)
        for group in (32, 64)
    },
    **{mode: {"quantize": True, "q_mode": mode} for mode in ("mxfp8", "nvfp4", "mxfp4")},
}


@dataclass
class Quality:
    """Bits per byte and perplexity per token; mean KL and agreement against a reference."""

    bits_per_byte: float
    perplexity: float
    kl: float
    top1: float


def log_probabilities(model: Any, tokenizer: Any, stories: Sequence[str]) -> Iterator[Any]:
    """Yield log p of every token at every position of a story, and the tokens."""
    for story in stories:
        tokens = mx.array([*tokenizer.encode(story), tokenizer.eos_token_id])
        logits = model(tokens[None, :-1])[0]
        yield logits - mx.logsumexp(logits, axis=-1, keepdims=True), tokens[1:]


def measure(model: Any, tokenizer: Any, reference: list[mx.array] | None = None) -> Quality:
    """Return a model's quality on the stories, compared with log probabilities of another."""
    nats: Any = 0.0
    kl: Any = 0.0
    same: Any = 0.0
    count = 0
    for i, (logp, tokens) in enumerate(log_probabilities(model, tokenizer, STORIES)):
        expected = logp if reference is None else reference[i]
        nats -= mx.take_along_axis(logp, tokens[:, None], -1).sum().item()
        kl += (mx.exp(expected) * (expected - logp)).sum().item()
        same += (expected.argmax(-1) == logp.argmax(-1)).sum().item()
        count += tokens.size
    nbytes = sum(len(story.encode()) + 1 for story in STORIES)
    bits = nats / math.log(2)
    return Quality(bits / nbytes, math.exp(nats / count), kl / count, same / count)


def main(source: str | None = None) -> None:
    """Convert the embedded model (or the one in a folder) to every candidate and measure it."""
    from mlx_rgemma.io.hub import locate

    folder = locate(source).folder
    original, tokenizer = load(folder, dtype="float32")
    reference = [logp for logp, _ in log_probabilities(original, tokenizer, STORIES)]
    print("| weights | bits per byte | perplexity | mean KL | same top token | MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as work:
        for number, (name, options) in enumerate(CANDIDATES.items()):
            made = convert(folder, Path(work) / str(number), **options)
            rows = {name: "float32"}
            if name == "bf16":
                rows["bf16, computed in bf16"] = "bfloat16"
            for row, dtype in rows.items():
                model, tokenizer = load(made.folder, dtype=dtype)
                q = measure(model, tokenizer, reference)
                print(
                    f"| {row} | {q.bits_per_byte:.4f} | {q.perplexity:.2f} | {q.kl:.1e}"
                    f" | {q.top1:.2%} | {made.nbytes / 1e6:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
