"""Available memory, from the sources of each system."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_rgemma.errors import UserError
from mlx_rgemma.io import memory

GIB = 1 << 30


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """A Linux machine with 8 GiB available; returns the folder of its control group."""
    monkeypatch.setattr(memory.sys, "platform", "linux")
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_without_a_limit(linux):
    assert memory.available_memory() == 8 * GIB
    (linux / "memory.max").write_text("max\n")
    (linux / "memory.current").write_text(f"{GIB}\n")
    assert memory.available_memory() == 8 * GIB
    (linux / "meminfo").unlink()
    assert memory.available_memory() is None


def test_limit_of_a_container(linux):
    (linux / "memory.max").write_text(f"{6 * GIB}\n")
    (linux / "memory.current").write_text(f"{5 * GIB}\n")
    assert memory.available_memory() == GIB
    (linux / "memory.stat").write_text(f"anon 1\ninactive_file {2 * GIB}\nactive_file {GIB}\n")
    assert memory.available_memory() == 4 * GIB, "the page cache can be reclaimed"
    (linux / "memory.current").write_text(f"{7 * GIB + 3 * GIB}\n")
    assert memory.available_memory() == 0


def test_limit_of_an_older_container(linux):
    (linux / "memory").mkdir()
    (linux / "memory/memory.limit_in_bytes").write_text(f"{3 * GIB}\n")
    (linux / "memory/memory.usage_in_bytes").write_text(f"{2 * GIB}\n")
    (linux / "memory/memory.stat").write_text(
        f"inactive_file 5\nactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
    )
    assert memory.available_memory() == 2 * GIB


@pytest.mark.parametrize("metal", [True, False])
def test_mac(monkeypatch, metal):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    sizes = {"SC_PAGE_SIZE": 1 << 14, "SC_PHYS_PAGES": 1 << 20}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(mx, "metal", SimpleNamespace(is_available=lambda: metal))
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * GIB})
    monkeypatch.setattr(mx, "get_active_memory", lambda: 3 * GIB)
    assert memory.available_memory() == (9 if metal else 13) * GIB


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="other system")
def test_this_machine():
    assert 10**7 < memory.available_memory() < 10**14


def test_check(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000_000)
    memory.check_memory("x", 1_000_000_000, "do this")
    with pytest.raises(
        UserError, match=r"^x needs 2\.00 GB of memory, 1\.00 GB are available; do this\.$"
    ):
        memory.check_memory("x", 2_000_000_000, "do this")
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.check_memory("x", 1 << 60, "do this")
