"""What glibc does with freed memory on Linux: kept, but for whoever has set that up."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from mlx_rgemma import allocation

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux frees by glibc"
)

FAULTS = """
import resource
import mlx_rgemma
import mlx.core as mx

x = mx.zeros((4 << 20,))  # 16 MB


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def several():
    mx.eval([x + float(i) for i in range(6)])


for _ in range(3):
    several()
before = faults()
for _ in range(20):
    several()
print(faults() - before)
"""


def page_faults(**variables: str) -> int:
    """Pages that the kernel hands out for arrays of 16 MB, made and let go of many times."""
    environment = {k: v for k, v in os.environ.items() if k not in allocation._SETTINGS}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**environment, **variables},
    )
    return int(run.stdout)


def test_freed_memory_serves_the_next_array():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this Linux has no glibc")
    as_glibc_does = page_faults(GLIBC_TUNABLES="glibc.malloc.check=0")  # set up: left alone
    assert 10 * page_faults() < as_glibc_does  # which gives back most of the six


def test_settings_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not allocation.keep_freed_memory()
