"""Where operations run, and on what."""

from __future__ import annotations

import math
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
    """Cores of the CPU that this process may use, a container's share of them included."""
    return max(int(min(len(os.sched_getaffinity(0)), _quota())), 1)


def _quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """How many cores' time the process's control groups allow it; infinite without a limit.

    Args:
        groups: Where control groups are, of version 2, or in folders of version 1.
        own: The process's: lines of ``number:controllers:/path``.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return math.inf
    found = [math.inf]
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = (groups / controllers if controllers else groups) / path.lstrip("/")
        for folder in (group, *group.parents):
            found.append(_limit(folder))
            if folder == groups:
                break
    return min(found)


def _limit(group: Path) -> float:
    """What one control group allows."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        cores = math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return cores


@cache
def has_avx512() -> bool:
    """Whether the CPU has AVX-512, as x86-64 processors since Skylake-SP and Zen 4 do."""
    try:
        return " avx512f " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
