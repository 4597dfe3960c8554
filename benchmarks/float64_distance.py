"""Distance of float32 logits from float64: `python -m benchmarks.float64_distance`.

Random models, as training begins with them, in one pass and token by token; for each case the
median over the seeds. Prints the table of docs/design/numerics.md. Minutes on two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma import GriffinConfig, Model
from mlx_rgemma.tuner.init import initialize
from tests.helpers.float64_model import Array, float64_logits

VOCABULARY = 256
ALL_ATTENTION = {"block_types": ("attention",)}


@dataclass(frozen=True)
class Case:
    """A kind of model and a length of text."""

    name: str
    width: int
    length: int
    seeds: int
    changes: dict[str, Any] = field(default_factory=dict)


UNSCALED = {"embeddings_scale_by_sqrt_dim": False, "logits_soft_cap": 0.0}
CASES = (
    Case("released rules", 128, 200, 10),
    Case("released rules", 128, 3000, 10),
    Case("released rules", 128, 10_000, 3),
    Case("attention alone", 128, 3000, 10, ALL_ATTENTION),
    Case("attention alone", 128, 10_000, 3, ALL_ATTENTION),
    *(Case("no scale, no cap", width, 64, 10, UNSCALED) for width in (512, 1024, 2048)),
)


def random_model(case: Case, seed: int) -> Model:
    """Return a model of the case; its embedding has variance 1 where it is not scaled."""
    config = GriffinConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.width,
        lru_width=case.width,
        intermediate_size=6 * case.width,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=case.width // 4,
        attention_window_size=256,
        **case.changes,
    )
    model = Model(config)
    initialize(model, seed)
    if not config.embeddings_scale_by_sqrt_dim:
        embedding = model.model.embed_tokens
        embedding.weight = embedding.weight * config.hidden_size**0.5
    model.eval()
    model.prepare_for_inference(dequantize=False)
    return model


def by_steps(model: Model, tokens: mx.array, prompt: int) -> Array:
    """Return the logits of a prompt and of the tokens after it, one at a time."""
    cache = model.make_cache()
    found = [np.array(model(tokens[:, :prompt], cache=cache)[0])]
    found += [np.array(model(tokens[:, [i]], cache=cache)[0]) for i in range(prompt, tokens.size)]
    return np.concatenate(found)


def measure(case: Case) -> str:
    """Return the case's row of the table."""
    errors, largest = [], []
    for seed in range(case.seeds):
        model = random_model(case, seed)
        tokens = np.random.default_rng(seed).integers(0, VOCABULARY, case.length)
        exact = float64_logits(model, tokens)
        array = mx.array(tokens[None])
        whole = np.array(model(array)[0]) - exact
        steps = by_steps(model, array, case.length - 50) - exact
        errors.append([rms(whole), abs(whole).max(), rms(steps), abs(steps).max()])
        largest.append(abs(exact).max())
    figures = [f"{value:.1e}" for value in np.median(errors, axis=0)]
    sizes = [f"{case.width:,}", f"{case.length:,}", f"{case.seeds}", f"{np.median(largest):.0f}"]
    return f"| {' | '.join([case.name, *sizes, *figures])} |"


def rms(x: Array) -> float:
    return float(np.sqrt(np.square(x).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, help="Write the table there as well.")
    args = parser.parse_args()
    names = ["model", "width", "tokens", "seeds", "largest logit"]
    names += [f"{way}, {what}" for way in ("one pass", "steps") for what in ("rms", "max")]
    rows = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        print(row, flush=True)
    for case in CASES:
        rows.append(measure(case))
        print(rows[-1], flush=True)
    if args.output is not None:
        args.output.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
