"""Where operations run, and on what."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx

_LINUX = sys.platform.startswith("linux")


def on_linux_cpu() -> bool:
    """Whether operations run on a Linux CPU."""
    return _LINUX and mx.default_device().type == mx.cpu


@cache
def cores() -> int:
    """Cores of the CPU that this process may use."""
    return len(os.sched_getaffinity(0))


@cache
def has_avx512() -> bool:
    """Whether the CPU has AVX-512, as x86-64 processors since Skylake-SP and Zen 4 do."""
    try:
        return " avx512f " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
