"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def process_peak() -> int:
    """Return the peak resident bytes, since `reset_process_peak` where that works."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_process_peak() -> bool:
    """Reset the peak; return whether the system can (Linux can)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
