"""Memory that is available to this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mlx_rgemma.errors import UserError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
    ),
)
"""Limit, usage and statistics of a control group, in both versions of Linux's interface."""


def physical_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int | None:
    """Return the bytes available to this process, or None if the system does not report them.

    On a Mac: Metal's recommended working set minus MLX's active memory. On Linux: memory available
    without swapping, within the limit of the control group (container). The page cache counts as
    available.
    """
    if sys.platform == "darwin":
        return _on_mac()
    available = _numbers(MEMINFO).get("MemAvailable:")
    if available is None:
        return None
    available *= 1024
    for limit, used, statistics in CGROUP_FILES:
        try:
            maximum, usage = (int((CGROUP / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
        cached = _numbers(CGROUP / statistics)
        total = "total_" if "total_inactive_file" in cached else ""
        usage -= sum(cached.get(f"{total}{name}_file", 0) for name in ("active", "inactive"))
        available = min(available, maximum - max(0, usage))
    return max(0, available)


def check_memory(what: str, needed: int, remedy: str) -> None:
    """Refuse an operation that needs more memory than is available.

    Args:
        what: Beginning of the message, usually a path.
        needed: Bytes that it needs.
        remedy: End of the message.

    Raises:
        UserError: If less is available.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise UserError(
            f"{what} needs {needed / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are available;"
            f" {remedy}."
        )


def _on_mac() -> int | None:
    import mlx.core as mx

    memory = physical_memory()
    if mx.metal.is_available():
        stated = mx.device_info().get("max_recommended_working_set_size", memory)
        memory = min(memory, int(stated))
    return max(0, memory - mx.get_active_memory())


def _numbers(file: Path) -> dict[str, int]:
    """Parse lines of a name and a number."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
