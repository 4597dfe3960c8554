"""Each of several processes reads its own part of every matrix, and nothing beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rgemma.checkpoints import sharded_reader as parts
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.griffin.sharding import local_shard
from mlx_rgemma.io.safetensors import read_header

ROWS = "model.layers.0.mlp_block.gate_proj.weight"
COLUMNS = "model.layers.0.mlp_block.down_proj.weight"
DTYPES = [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8]


@pytest.fixture(params=DTYPES, ids=str)
def file(request, tmp_path) -> Path:
    """Two matrices between others, of rows that are more than are asked for at once."""
    values = mx.random.randint(0, 250, (parts.READ_AHEAD_ROWS + 6, 12), key=mx.random.key(0))
    value = values.astype(request.param)
    path = tmp_path / "x.safetensors"
    tensors = {"a": value[:3], ROWS: value, "n": value[:5], COLUMNS: value[::-1], "z": value}
    mx.save_safetensors(str(path), tensors)
    return path


def bytes_read() -> int:
    """What this process has read from files, by calls for it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_a_part_is_that_of_the_whole(file, name, size):
    whole = mx.load(str(file))
    for rank in range(size):
        got = parts.read_shards({name: whole[name]}, read_header(file), rank, size)[name]
        expected = local_shard(name, whole[name], rank, size)
        assert got.dtype == expected.dtype and mx.array_equal(got, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts what is read")
@pytest.mark.parametrize("name", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_no_more_is_read(file, name):
    whole, header = mx.load(str(file)), read_header(file)
    counting = -bytes_read() + bytes_read()
    before = bytes_read()
    part = parts.read_shards({name: whole[name]}, header, 1, 2)[name]
    assert bytes_read() - before - counting == part.nbytes == whole[name].nbytes // 2


def test_a_file_that_becomes_shorter_is_an_error(file):
    whole, header = mx.load(str(file)), read_header(file)
    data = file.read_bytes()
    file.write_bytes(data[: header[COLUMNS].start + 100])
    with pytest.raises(CheckpointError, match=r"x.safetensors: cannot be read \(it has become"):
        parts.read_shards({COLUMNS: whole[COLUMNS]}, header, 0, 2)


def test_what_is_not_cut_stays_whole(file):
    whole = mx.load(str(file))
    got = parts.read_shards({"a": whole["a"]}, read_header(file), 1, 2)["a"]
    assert np.array_equal(np.array(got.view(mx.uint8)), np.array(whole["a"].view(mx.uint8)))
