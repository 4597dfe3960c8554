"""Write without end, a million tokens if asked: what grows? Nothing.

    python examples/endless_stream.py --tokens 1000000 --plot memory.png

Prints the tokens written so far, the bytes of the state, what MLX holds and the size of the
process. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from mlx_rgemma import Session, load


def process_mb() -> float:
    """Resident size of this process now, in MB (NaN where /proc does not exist)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    return pages * 4096 / 1e6


def write(session: Session, tokens: int, show: bool, every: int) -> list[tuple[int, float, float]]:
    """Write tokens; return rows of (tokens, MB held by MLX, MB of the process)."""
    rows, done, start = [], 0, time.perf_counter()
    prompt: str | None = "Once upon a time"
    while done < tokens:
        for response in session.stream(
            prompt, max_tokens=tokens - done, sampler=make_sampler(temp=1.0)
        ):
            done += 1
            if show:
                print(response.text, end="", flush=True)
            if done % every == 0:
                rows.append((done, mx.get_active_memory() / 1e6, process_mb()))
                speed = done / (time.perf_counter() - start)
                print(
                    f"{done:12,}  {session.nbytes:11,}  {rows[-1][1]:13.3f}  {rows[-1][2]:10.1f}"
                    f"  {speed:8.0f}",
                    flush=True,
                )
        prompt = None  # a story has ended: the next one begins in the same state
    return rows


def plot(rows: list[tuple[int, float, float]], file: Path) -> None:
    """Draw memory over tokens."""
    from matplotlib import pyplot

    tokens, held, process = zip(*rows, strict=True)
    pyplot.plot(tokens, process, label="process")
    pyplot.plot(tokens, held, label="held by MLX")
    pyplot.xlabel("tokens written")
    pyplot.ylabel("MB")
    pyplot.ylim(bottom=0)
    pyplot.legend()
    pyplot.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or repository; default: the embedded model")
    parser.add_argument("--tokens", type=int, default=1_000, help="tokens to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    parser.add_argument("--show", action="store_true", help="print the text, too")
    parser.add_argument("--plot", type=Path, help="draw memory over tokens into this file")
    args = parser.parse_args()

    mx.random.seed(args.seed)
    session = Session(*load(args.model))
    print("      tokens  state bytes  MLX active MB  process MB  tokens/s", flush=True)
    rows = write(session, args.tokens, args.show, max(1, args.tokens // 10))
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    sys.exit(main())
