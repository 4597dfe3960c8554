"""Headers of safetensors files: what is refused, and that what is written can be read."""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.safetensors import (
    TensorInfo,
    read_header,
    verify_checksums,
    write_file,
)


def file_of(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SOUND = {"a": entry(), "b": entry("BF16", (2, 2), (8, 16))}

BROKEN = {
    "empty": (b"", "truncated"),
    "short": (b"\x08\0\0", "truncated"),
    "header longer than the file": ((1 << 20).to_bytes(8, "little") + b"{}", "truncated"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}

WRONG = {
    "not JSON": (b"{nope", b"", "not JSON"),
    "not text": (b"\xff\xfe", b"", "not JSON"),
    "deep": (b"[" * 100_000, b"", "not JSON"),
    "a list": ([], b"", "not a JSON object"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}',
        b"",
        "names a tensor twice",
    ),
    "no entry": ({"a": 1}, b"", "not an object"),
    "unknown dtype": ({"a": entry("Q4")}, bytes(8), "unknown dtype 'Q4'"),
    "dtype of no text": ({"a": entry(["F32"])}, bytes(8), "unknown dtype"),
    "negative shape": ({"a": entry(shape=(-2,))}, bytes(8), "no valid shape"),
    "shape of text": ({"a": entry(shape=("2",))}, bytes(8), "no valid shape"),
    "shape of truths": ({"a": entry(shape=(True,))}, bytes(8), "no valid shape"),
    "many dimensions": ({"a": entry(shape=(1,) * 17)}, bytes(8), "no valid shape"),
    "huge shape": ({"a": entry(shape=(1 << 63,))}, bytes(8), "no valid shape"),
    "one offset": ({"a": entry(offsets=(0,))}, bytes(8), "no valid shape"),
    "too few bytes": ({"a": entry(shape=(3,))}, bytes(8), "does not lie"),
    "a hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "does not lie"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "does not lie"),
    "truncated data": (SOUND, bytes(15), "truncated: 1"),
    "surplus data": (SOUND, bytes(17), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_not_a_file_of_its_kind(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("header", "data", "message"), WRONG.values(), ids=WRONG)
def test_wrong_header(tmp_path, header, data, message):
    path = file_of(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


MANY = (
    b"{"
    + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(110_000))
    + b"}"
)
LARGE = {
    "tensors": (MANY, "names more than 100,000 tensors"),
    "bytes": (b" " * 10_000_001, "header has 10,000,001 bytes, expected at most 10,000,000"),
    "a name": ({"x" * 1_000_000: 1}, "the entry of 'xxxx"),
    "a dtype": ({"x": entry("Q" * 1_000_000)}, "unknown dtype 'QQQQ"),
}


@pytest.mark.parametrize(("header", "message"), LARGE.values(), ids=LARGE)
def test_large_header(tmp_path, header, message):
    """Refused in bounded time, and in a line of bounded length."""
    path = file_of(tmp_path / "model.safetensors", header, bytes(8))
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert time.process_time() - started < 10
    assert len(str(error.value)) < len(str(path)) + 250


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)


def test_sound_header(tmp_path):
    header = {"__metadata__": {"format": "pt"}, **SOUND, "none": entry("U8", (0, 3), (8, 8))}
    path = file_of(tmp_path / "x.safetensors", header, bytes(16))
    found = read_header(path)
    assert {name: info.shape for name, info in found.items()} == {
        "a": (2,),
        "none": (0, 3),
        "b": (2, 2),
    }
    assert found["b"].nbytes == 8
    assert found["b"].start == path.stat().st_size - 8


def test_what_is_written_is_read_by_others(tmp_path):
    from safetensors.numpy import load_file

    values = {
        "float": mx.arange(6, dtype=mx.float32).reshape(2, 3).T,  # not contiguous
        "half": mx.array([1.5, -2.0], mx.float16),
        "packed": mx.array([[1, 2**32 - 1]], mx.uint32),
        "scales": mx.array([3, 4, 5], mx.uint8),
    }
    names = {"float32": "F32", "float16": "F16", "uint32": "U32", "uint8": "U8"}
    plan = [
        TensorInfo(name, names[str(value.dtype).rpartition(".")[2]], value.shape)
        for name, value in values.items()
    ]
    path, written = tmp_path / "new.safetensors", []
    write_file(path, plan, iter(values.items()), {"format": "mlx"}, written.append)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, np.array(values[name]))
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert loaded.keys() == values.keys() and metadata["format"] == "mlx"
    assert written == [info.nbytes for info in plan]
    assert read_header(path)["packed"].shape == (1, 2)


def test_bfloat16_is_written_to_the_bit(tmp_path):
    value = mx.random.normal((17, 3)).astype(mx.bfloat16)
    path = tmp_path / "new.safetensors"
    write_file(path, [TensorInfo("x", "BF16", (17, 3))], iter([("x", value)]), {})
    assert mx.array_equal(mx.load(str(path))["x"], value).item()


def test_writer_keeps_to_what_it_announced(tmp_path):
    plan = [TensorInfo("x", "F32", (2,))]
    for number, surprise in enumerate((mx.zeros(3), mx.zeros(2, mx.float16))):
        with pytest.raises(ValueError, match="does not match"):
            write_file(tmp_path / str(number), plan, iter([("x", surprise)]), {})


def test_checksums(tmp_path):
    """A writer that streams stores them in the header that it wrote first."""
    values = {"a": mx.arange(6, dtype=mx.float32).reshape(2, 3).T, "b": mx.array([7], mx.uint8)}
    plan = [TensorInfo("a", "F32", (3, 2)), TensorInfo("b", "U8", (1,))]
    path = tmp_path / "new.safetensors"
    write_file(path, plan, iter(values.items()), {"format": "mlx"})
    sums = json.loads(mx.load(str(path), return_metadata=True)[1]["crc32"])
    expected = {name: zlib.crc32(np.ascontiguousarray(value)) for name, value in values.items()}
    assert sums == {name: f"{value:08x}" for name, value in expected.items()}
    verify_checksums(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="'a' is damaged: its checksum is"):
        verify_checksums(path)
    file_of(path, SOUND, bytes(16))
    verify_checksums(path)  # has none
