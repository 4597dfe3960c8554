"""Read a million tokens and generate on: what grows? Nothing.

    python examples/constant_memory.py --tokens 1000000 --generate 20000

Prints, as it goes, the tokens read so far, the bytes of the state, what MLX holds, and the size of
the process as the operating system sees it.
"""

from __future__ import annotations

import argparse
import time

import mlx.core as mx
import numpy as np

from mlx_rgemma import load_model
from mlx_rgemma.griffin.cache import state_nbytes


def process_mb() -> float:
    """Resident size of this process now, in MB (NaN where /proc does not exist)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return float("nan")
    return pages * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or repository; default: the embedded model")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to read")
    parser.add_argument("--generate", type=int, default=2_000, help="tokens to generate then")
    parser.add_argument("--chunk", type=int, default=2_048, help="tokens read at a time")
    args = parser.parse_args()

    model, _ = load_model(args.model)
    cache = model.make_cache()
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    print("      tokens  state bytes  MLX active MB  process MB  tokens/s", flush=True)

    def report(tokens: int) -> None:
        speed = tokens / (time.perf_counter() - start)
        print(
            f"{tokens:12,}  {state_nbytes(cache):11,}  {mx.get_active_memory() / 1e6:13.3f}"
            f"  {process_mb():10.1f}  {speed:8.0f}",
            flush=True,
        )

    every = max(args.chunk, args.tokens // 10 // args.chunk * args.chunk)
    for at in range(0, args.tokens, args.chunk):
        size = min(args.chunk, args.tokens - at)
        tokens = rng.integers(3, model.args.vocab_size, (1, size))
        model(mx.array(tokens), cache=cache)
        mx.eval([layer.state for layer in cache])
        if (at + size) % every == 0 or at == 0:
            report(at + size)

    token = mx.array([[2]])
    start = time.perf_counter()
    print("generating")
    for n in range(1, args.generate + 1):
        token = model(token, cache=cache)[:, -1:].argmax(axis=-1)
        mx.eval(token)
        if n % max(1, args.generate // 5) == 0 or n == 100:
            report(n)


if __name__ == "__main__":
    main()
