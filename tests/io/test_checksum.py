"""Checksums: any flipped bit of a tensor is found and named."""

from __future__ import annotations

import zlib

import mlx.core as mx
import numpy as np
import pytest

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io import checksum
from mlx_rgemma.io.checksum import CRC32, UNKNOWN, crc32, dump_checksums, verify_file
from mlx_rgemma.io.safetensors import read_header

ARRAYS = {
    "a": mx.arange(12, dtype=mx.int32).reshape(3, 4),
    "b.weight": mx.random.normal((7, 5)).astype(mx.bfloat16),
    "scalar": mx.array(3.0),
    "none": mx.zeros((0, 4)),
    "flag": mx.array([True, False]),
    "ü": mx.arange(3, dtype=mx.int64),
}


def saved(path):
    sums = dump_checksums({name: crc32(value) for name, value in ARRAYS.items()})
    mx.save_safetensors(str(path), ARRAYS, {CRC32: sums})
    return sums


@pytest.mark.parametrize("dtype", [mx.float32, mx.int64, mx.uint8, mx.complex64])
def test_a_checksum_is_the_crc_of_the_bytes(dtype):
    value = mx.arange(24).astype(dtype).reshape(2, 3, 4)
    assert crc32(value) == f"{zlib.crc32(np.array(value).tobytes()):08x}"
    swapped = value.swapaxes(0, 2)  # not contiguous
    assert crc32(swapped) == f"{zlib.crc32(np.array(swapped).tobytes()):08x}"
    assert crc32(value[:, 1:2, ::2]) == f"{zlib.crc32(np.array(value[:, 1:2, ::2]).tobytes()):08x}"
    assert len(UNKNOWN) == len(crc32(value))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_sound_file_passes_and_each_flipped_bit_is_named(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(checksum, "CHUNK_BYTES", chunk)
    path = tmp_path / "x.safetensors"
    sums = saved(path)
    tensors = read_header(path)
    assert set(tensors) == set(ARRAYS)
    verify_file(path, tensors, sums)
    whole = path.read_bytes()
    for name, tensor in tensors.items():
        for at in range(tensor.start, tensor.start + tensor.nbytes):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            verify_file(path, tensors, None)  # without checksums nobody can tell
            with pytest.raises(CheckpointError, match=f"'{name}' is damaged") as error:
                verify_file(path, tensors, sums)
            assert str(error.value).startswith(f"{path}: ")
            assert str(error.value).isprintable()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        verify_file(path, tensors, sums)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify_file(path, tensors, sums)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[" * 100_000, '{"a": 1}', '{"a": "0000000G"}', "x\n" * 1000]
)
def test_unreadable_checksums_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "x.safetensors"
    saved(path)
    with pytest.raises(CheckpointError, match="unreadable checksums") as error:
        verify_file(path, read_header(path), text)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_checksums_of_other_tensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    sums = saved(path)
    tensors = read_header(path)
    for other in ({**tensors, "more": tensors["a"]}, {"a": tensors["a"]}):
        with pytest.raises(CheckpointError, match="do not match"):
            verify_file(path, other, sums)
