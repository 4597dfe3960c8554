"""The cost of a long text, beside a transformer, as in the Griffin paper (arXiv:2402.19427).

    python -m benchmarks.flat_or_growing --plot docs/flat_or_growing.svg

This package's model beside a Gemma of the same width and depth from mlx-lm, both with random
weights. After each context length: the speed of prefill, the speed of decoding, and the bytes kept
between two tokens. This package's model reads every token. Gemma's KV cache is filled with random
values instead, which saves most of the time and does not change its speed. The picture needs the
extra `plot`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.harness import plot
from mlx_rgemma import cli
from mlx_rgemma.evaluation import machine
from mlx_rgemma.evaluation.random_model import SHAPES, random_model

GRIFFIN, GEMMA = "RecurrentGemma (mlx_rgemma)", "Gemma (mlx-lm)"
PANELS = {
    "read_tps": "prefill tokens/s",
    "generate_tps": "generated tokens/s",
    "state_mb": "MB kept between tokens",
}


class Griffin:
    """This package's model."""

    def __init__(self, shape: str) -> None:
        self.model = random_model(SHAPES[shape], mx.float32)
        self.cache, self.read = self.model.make_cache(), 0

    def after(self, context: int) -> list[Any]:
        """Return a state that has read `context` tokens."""
        while self.read < context:
            length = min(2048, context - self.read)
            read(self.model, self.cache, length)
            self.read += length
        return copy.deepcopy(self.cache)


class Gemma:
    """mlx-lm's Gemma with the same width, depth and heads, and one key/value head."""

    def __init__(self, shape: str) -> None:
        from mlx_lm.models.gemma import Model, ModelArgs

        c = SHAPES[shape]
        self.args = ModelArgs(
            model_type="gemma",
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            intermediate_size=c.intermediate_size // 2,
            num_attention_heads=c.num_attention_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.rms_norm_eps,
            vocab_size=c.vocab_size,
            num_key_value_heads=1,
        )
        self.model = Model(self.args)
        self.model.eval()
        mx.eval(self.model.parameters())

    def after(self, context: int) -> list[Any]:
        """Return a KV cache of `context` tokens, filled with random values."""
        from mlx_lm.models.cache import KVCache

        caches = [KVCache() for _ in self.model.layers]
        for i, cache in enumerate(caches if context else []):
            keys, values = mx.random.normal(
                (2, 1, 1, context, self.args.head_dim), key=mx.random.key(i)
            )
            mx.eval(keys, values)
            cache.keys, cache.values, cache.offset = keys, values, context
        return caches


def read(model: Any, cache: list[Any], length: int) -> float:
    """Read random tokens; return the seconds."""
    tokens = mx.random.randint(0, model.args.vocab_size, (1, length))
    mx.eval(tokens)
    begin = time.perf_counter()
    model(tokens, cache=cache)
    mx.eval([layer.state for layer in cache])
    return time.perf_counter() - begin


def generate(model: Any, cache: list[Any], length: int) -> float:
    """Generate; return the seconds from the first token to the last."""
    from mlx_lm.generate import generate_step

    times = []
    for _ in generate_step(mx.array([1]), model, max_tokens=length, prompt_cache=cache):
        times.append(time.perf_counter())
    mx.synchronize()
    return times[-1] - times[0]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A point for each model and number of tokens; the models take turns."""
    models: dict[str, Any] = {GRIFFIN: Griffin(args.shape), GEMMA: Gemma(args.shape)}
    points = []
    print(f"{'tokens read':>11}  {'':27}  reading, t/s  generating, t/s  kept, MB")
    for context in args.contexts:
        trials: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        state = dict.fromkeys(models, 0)
        for trial in range(args.trials + 1):
            for name, holder in models.items():
                cache = holder.after(context)
                state[name] = sum(layer.nbytes for layer in cache)
                speeds = (
                    args.chunk / read(holder.model, cache, args.chunk),
                    (args.generate - 1) / generate(holder.model, cache, args.generate),
                )
                del cache
                mx.clear_cache()
                if trial:  # the first one warms up
                    trials[name].append(speeds)
        for name, found in trials.items():
            reading, generating = (statistics.median(speeds) for speeds in zip(*found, strict=True))
            point = dict(zip(PANELS, (reading, generating, state[name] / 1e6), strict=True))
            points.append({"model": name, "tokens": context, **point})
            print(
                f"{context:11,}  {name:27}  {reading:12.0f}  {generating:15.1f}"
                f"  {state[name] / 1e6:8.2f}",
                flush=True,
            )
    return points


def draw(path: Path, points: list[dict[str, Any]], title: str) -> None:
    """Draw one panel per figure, one line per model."""
    figure, panels = plot.panels_of(len(PANELS), title)
    for panel, (key, heading) in zip(panels, PANELS.items(), strict=True):
        for name in dict.fromkeys(point["model"] for point in points):
            line = [point for point in points if point["model"] == name]
            panel.plot([p["tokens"] for p in line], [p[key] for p in line], marker="o", label=name)
        plot.finish_panel(panel, heading, "tokens read before")
    plot.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="40m", help="width and depth of both models")
    add("--contexts", type=int, nargs="+", default=[2**n for n in range(9, 16)], metavar="N")
    add("--chunk", type=int, default=128, help="tokens to read, timed")
    add("--generate", type=int, default=17, help="tokens to generate, timed from the first on")
    add("--trials", type=int, default=3, help="how often; medians are shown")
    add("--plot", type=Path, metavar="FILE", help="draw the picture")
    add("--json", type=Path, metavar="FILE", help="write the points")
    args = parser.parse_args()
    if args.plot is not None:
        plot.check(args.plot)
    mx.random.seed(0)
    facts = machine.describe()
    print("\n".join(machine.header(facts)), flush=True)
    points = measure(args)
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": facts, "points": points}, indent=1) + "\n")
    if args.plot is not None:
        c = SHAPES[args.shape]
        title = (
            f"{c.num_hidden_layers} layers of width {c.hidden_size}, random weights, float32;"
            f" {facts['cpu']}, {facts['cores']} cores, {facts['device'].upper()}"
        )
        draw(args.plot, points, title)


if __name__ == "__main__":
    sys.exit(cli.run(main))
