"""What becomes of memory that MLX frees on Linux.

MLX allocates every array by `malloc` there, and glibc gives large blocks back to the kernel at
once: the next array of the size costs a page fault for every 4 KB, which takes longer than an
addition of its elements. So glibc is told to keep up to half a gigabyte of what is freed. Reading
a prompt of 2,048 tokens with a model of width 512 takes a tenth less time with it.
"""

from __future__ import annotations

import os
import sys

KEPT_BYTES = 512 << 20
"""Free memory at the end of the heap that is not given back."""
HEAP_BYTES = 32 << 20
"""Blocks up to which the heap serves; glibc takes no larger number on every version."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory; False where there is no glibc, or the user has set it up."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, HEAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
