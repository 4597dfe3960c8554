"""MLX connects without letting other threads run: if it waits for ever, one line says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CONNECT = """
import ctypes, sys
import mlx.core as mx
from mlx_rgemma.distributed.group import _connect
from mlx_rgemma.distributed.rank_info import RankInfo

def init(strict):
    if sys.argv[2] == "waits":
        ctypes.PyDLL(None).sleep(60)  # with Python's lock, as MLX does
    if sys.argv[2] == "fails":
        raise RuntimeError("no route to a host")
    return Group()

class Group:
    rank = staticmethod(lambda: int(sys.argv[1]))
    size = staticmethod(lambda: 3)

mx.distributed.init = init
_connect(RankInfo(int(sys.argv[1]), 3, None, frozenset(), {}))
print("connected")
"""


def connect(rank: int, how: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", CONNECT, str(rank), how],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "MLX_RGEMMA_PEER_TIMEOUT": "1"},
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_without_end_is_one_line_of_the_first(rank):
    done = connect(rank, "waits")
    assert done.returncode == 1 and done.stdout == ""
    line = (
        "error: MLX has not connected the 3 processes within 1 s: one was lost, or cannot reach"
        " the next one's address in the hostfile; start them again.\n"
    )
    assert done.stderr == (line if rank == 0 else "")


def test_connecting_says_nothing():
    done = connect(0, "comes")
    assert (done.returncode, done.stdout, done.stderr) == (0, "connected\n", "")


def test_what_mlx_says_is_passed_on():
    done = connect(0, "fails")
    assert "UserError: MLX cannot connect the processes: no route to a host." in done.stderr
    assert "has not connected" not in done.stderr
