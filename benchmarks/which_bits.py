"""Bits that each part of a model needs: `python -m benchmarks.which_bits [MODEL] [TEXT]`.

Prints two tables of KL divergence from the unquantized model: when one part alone has 4 bits, and
when all have 4 but some of them 5. The recipe `rgemma` of `convert -q` was chosen by them.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_rgemma import Model, load
from mlx_rgemma.evaluation.perplexity import Reference, TokenizedText, measure, tokenize_documents
from mlx_rgemma.io.text import read_documents

EMBEDDING = ("embed_tokens",)
RECURRENT = ("linear_x", "linear_y", "linear_out")
KEYS_VALUES = ("k_proj", "v_proj")
ATTENTION = ("q_proj", *KEYS_VALUES, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EVERYTHING = (*EMBEDDING, *RECURRENT, *ATTENTION, *MLP)

RAISED = {
    "none": (),
    "embedding": EMBEDDING,
    "recurrent": RECURRENT,
    "attention": ATTENTION,
    "MLP": MLP,
    "embedding, recurrent": (*EMBEDDING, *RECURRENT),
    "embedding, recurrent, keys, values": (*EMBEDDING, *RECURRENT, *KEYS_VALUES),
    "the same and queries (rgemma)": (*EMBEDDING, *RECURRENT, *KEYS_VALUES, "q_proj"),
    "all": EVERYTHING,
}


def measured(model: Model, bits: dict[str, int], rows: TokenizedText, reference: Reference):
    """Return the quality of a copy with these bits per matrix, their mean, and the weights."""
    copy = Model(model.args)
    parameters: Any = tree_flatten(model.parameters())
    copy.load_weights(parameters)
    copy.eval()
    sizes = {
        path: module.weight.size
        for path, module in copy.named_modules()
        if path.rpartition(".")[2] in bits
    }
    nn.quantize(
        copy,
        class_predicate=lambda path, _: (
            path in sizes and {"bits": bits[path.rpartition(".")[2]], "group_size": 64}
        ),
    )
    mx.eval(copy.parameters())
    total = sum(bits[path.rpartition(".")[2]] * size for path, size in sizes.items())
    return measure(copy, rows, reference), total / sum(sizes.values()), sum(sizes.values())


def main(source: str | None = None, text: str | None = None) -> None:
    """Measure a model, by default the embedded one on the stories of the package."""
    model, tokenizer = load(source)
    rows = tokenize_documents(tokenizer, read_documents(text, tokenizer))
    reference = Reference(model, rows)
    print("| 4 bits, alone | weights | mean KL | mean KL per million weights |")
    print("| --- | --- | --- | --- |")
    for part in EVERYTHING:
        quality, _, size = measured(model, {part: 4}, rows, reference)
        kl = quality.mean_kl or 0.0
        print(f"| {part} | {size:,} | {kl:.5f} | {kl / size * 1e6:.4f} |", flush=True)
    print("\n| 5 bits for, 4 for the rest | mean bits | mean KL | same top token |")
    print("| --- | --- | --- | --- |")
    for name, raised in RAISED.items():
        bits = {part: 5 if part in raised else 4 for part in EVERYTHING}
        quality, mean, _ = measured(model, bits, rows, reference)
        print(
            f"| {name} | {mean:.3f} | {quality.mean_kl:.5f} | {quality.top1_agreement:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
