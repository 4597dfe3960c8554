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

    On a GPU it is MLX that copies. On a CPU, where MLX copies with one thread and takes new memory
    each time, all cores copy from one array to another.

    Args:
        nbytes: Of the array; by default `copied_bytes()`.
        repeats: Copies to time.
    """
    import mlx.core as mx

    size = (copied_bytes() if nbytes is None else nbytes) // 4
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    seconds = copy_by_cores(size, repeats) if on_cpu else copy_by_mlx(size, repeats)
    return 2 * 4 * size / seconds


def copy_by_mlx(size: int, repeats: int) -> float:
    """Seconds that MLX takes for an array of `size` elements of 4 bytes."""
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


def copy_by_cores(size: int, repeats: int) -> float:
    """Seconds that all cores together take for an array of `size` elements of 4 bytes."""
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
