"""The processor that this process may use."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path


@cache
def num_threads() -> int:
    """Return the cores of this process's share of the machine, a container's limit included."""
    return max(int(min(len(os.sched_getaffinity(0)), _cgroup_cpu_limit())), 1)


def _cgroup_cpu_limit(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Return the cores' time that the process's control groups allow; infinite without a limit.

    Args:
        groups: Folder of the control groups, of version 2, or in folders of version 1.
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
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
