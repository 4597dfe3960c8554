"""The share of the machine's cores that a process may use."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_rgemma.cpu import device


@pytest.mark.parametrize(
    "own, limits, expected",
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, np.inf),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a\n", {"cpu.max": "50000 100000\n", "a/cpu.max": "300000 100000\n"}, 0.5),
        ("0::/gone\n", {}, np.inf),
        ("0::/\n", {"cpu.max": "not a number\n"}, np.inf),
        ("0::/\n", {"cpu.max": "1 0\n"}, np.inf),
        ("4:memory:/\n", {"memory/cpu.max": "100000 100000\n"}, np.inf),
        (
            "7:cpu,cpuacct:/x\n0::/\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "400000\n",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            4.0,
        ),
        (
            "7:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            np.inf,
        ),
    ],
)
def test_a_container_limits_the_threads(tmp_path, own, limits, expected):
    """Control groups of both versions; the narrowest of a group and its parents counts."""
    groups, process = tmp_path / "groups", tmp_path / "cgroup"
    groups.mkdir()
    process.write_text(own)
    for name, text in limits.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    assert device._cgroup_cpu_limit(groups, process) == expected
    assert device._cgroup_cpu_limit(groups, tmp_path / "none") == np.inf


def test_there_is_always_one_thread(monkeypatch):
    for quota, expected in ((0.3, 1), (1.9, 1), (2.0, 2), (np.inf, 3)):
        monkeypatch.setattr(device, "_cgroup_cpu_limit", lambda quota=quota: quota)
        monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1, 2})
        assert device.num_threads.__wrapped__() == expected
