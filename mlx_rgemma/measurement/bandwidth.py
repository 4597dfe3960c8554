"""How fast this machine copies memory: the limit that decoding runs against."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SMALLEST = 256 * 2**20
"""Bytes of the array that is copied, unless a cache is large."""

TIMES_THE_CACHE = 4


def copied_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of an array that no cache of this machine holds."""
    largest = 0
    for file in caches.glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 0)
        largest = max(largest, int(text[:-1]) * unit if unit else int(text))
    return max(SMALLEST, TIMES_THE_CACHE * largest)


def copy_bandwidth(nbytes: int | None = None, repeats: int = 3) -> float:
    """Bytes a second that a copy reads and writes: the best of some.

    MLX copies, on its default device; on a CPU, where MLX uses one thread for that, as many threads
    as there are cores copy too, and the faster of the two counts.

    Args:
        nbytes: Of the array; by default `copied_bytes()`.
        repeats: Copies of each kind.
    """
    import mlx.core as mx

    size = (copied_bytes() if nbytes is None else nbytes) // 4
    fastest = _copy_by_mlx(size, repeats)
    if mx.default_device() == mx.Device(mx.cpu):
        fastest = min(fastest, _copy_by_threads(size, repeats))
    return 2 * 4 * size / fastest


def _copy_by_mlx(size: int, repeats: int) -> float:
    import mlx.core as mx

    source = mx.zeros((size,), mx.int32)
    mx.eval(source)
    times = []
    for _ in range(repeats + 1):  # the first takes the memory
        begin = time.perf_counter()
        mx.eval(mx.negative(source))
        times.append(time.perf_counter() - begin)
    del source
    mx.clear_cache()
    return min(times)


def _copy_by_threads(size: int, repeats: int) -> float:
    import numpy as np

    threads = os.cpu_count() or 1
    source, target = np.ones(size, np.int32), np.ones(size, np.int32)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begin = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))
            times.append(time.perf_counter() - begin)
    return min(times)
