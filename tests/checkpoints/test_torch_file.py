"""`.pt` files: nothing that is pickled in them runs, and nothing is read that is not there."""

from __future__ import annotations

import pickle
import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.google_files import SAID, STORAGE, TORCH, torch_entry, torch_pickle, torch_zip

from mlx_rgemma import convert
from mlx_rgemma.checkpoints.formats.detect import LEGACY_TORCH
from mlx_rgemma.checkpoints.formats.pytorch import TorchFile
from mlx_rgemma.errors import CheckpointError

BYTES = np.arange(24, dtype=np.float32).tobytes()


def torch_file(path: Path, entries: dict[str, bytes], data: bytes = BYTES) -> TorchFile:
    """A file of one storage, key 0."""
    return TorchFile(torch_zip(path / "x.pt", torch_pickle(entries), [("0", data)]))


def test_tensors_and_strides(tmp_path):
    file = torch_file(
        tmp_path,
        {
            "plain": torch_entry((4, 6), "F32", "0"),
            "transposed": torch_entry((6, 4), "F32", "0", strides=(1, 6)),
            "parts": torch_entry((2, 3, 4), "F32", "0"),
        },
    )
    whole = np.arange(24, dtype=np.float32)
    assert {n: (t.dtype, t.shape) for n, t in file.tensors.items()} == {
        "plain": ("F32", (4, 6)),
        "transposed": ("F32", (6, 4)),
        "parts": ("F32", (2, 3, 4)),
    }
    assert np.array_equal(file.read("plain").view(np.float32), whole.reshape(4, 6))
    transposed = np.ascontiguousarray(file.read("transposed")).view(np.float32)
    assert np.array_equal(transposed, whole.reshape(4, 6).T)
    assert np.array_equal(file.read("parts", 1).view(np.float32), whole.reshape(2, 3, 4)[1])


def test_views_of_one_storage(tmp_path):
    """Tensors that share a storage, each at its place in it."""
    entry = torch_entry((24,), "F32", "0")
    half = entry.replace(pickle.dumps((24,), 2)[2:-1], pickle.dumps((12,), 2)[2:-1])
    second = half.replace(b"tQK\x00", b"tQK\x0c")
    assert half != entry and second != half
    file = torch_file(tmp_path, {"first": half, "second": second})
    assert np.array_equal(file.read("second").view(np.float32), np.arange(12, 24, dtype=np.float32))
    assert np.array_equal(file.read("first").view(np.float32), np.arange(12, dtype=np.float32))


def test_ordered_dictionary_of_a_module(tmp_path):
    """A state_dict is an OrderedDict with an attribute."""
    item = pickle.dumps("x", 2)[2:-1] + torch_entry((4, 6), "F32", "0") + b"s"
    content = b"\x80\x02ccollections\nOrderedDict\n)R" + item
    content += b"}" + pickle.dumps("_metadata", 2)[2:-1] + b"}sb."
    file = TorchFile(torch_zip(tmp_path / "x.pt", content, [("0", BYTES)]))
    assert file.tensors["x"].shape == (4, 6)


class Malice:
    """Pickles as a call of something."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def calls():
    import builtins
    import os
    import subprocess

    return {
        "os.system": (Malice(os.system, "touch {}"), r"posix\.system"),
        "subprocess": (Malice(subprocess.Popen, ["touch", "{}"]), r"\.Popen"),
        "eval": (Malice(builtins.eval, "open('{}', 'w')"), r"(__builtin__|builtins)\.eval"),
        "open": (Malice(builtins.open, "{}", "w"), r"open"),
        "getattr": (Malice(getattr, dict, "fromkeys"), r"getattr"),
        "numpy": (np.zeros(3), r"numpy.*_reconstruct"),
        "a class": (Malice(Path, "x"), r"pathlib"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", calls())
def test_nothing_runs(tmp_path, name, protocol):
    value, shown = calls()[name]
    trace = tmp_path / "trace"
    if isinstance(value, Malice):
        value.arguments = tuple(
            [part.replace("{}", str(trace)) for part in a]
            if isinstance(a, list)
            else a.replace("{}", str(trace))
            if isinstance(a, str)
            else a
            for a in value.arguments
        )
    content = pickle.dumps({"x": value}, protocol)
    torch_zip(tmp_path / "x.pt", content, [])
    with pytest.raises(CheckpointError, match=f"its pickle names .*{shown}"):
        convert(tmp_path / "x.pt", tmp_path / "out", **SAID)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


FOREIGN = {
    "parameter": (b"ctorch._utils\n_rebuild_parameter\n", r"torch\._utils\._rebuild_parameter"),
    "attribute of torch": (b"ctorch\nload\n", r"torch\.load"),
    "dotted": (b"\x8c\x05torch\x8c\x0bhub.load_zi\x93", r"torch\.hub\.load_zi"),
    "instance": (b"(ios\nsystem\n", r"os\.system"),
    "extension": (b"\x82\x01", "uses the opcode EXT1"),
    "line break": (b"\x8c\x05a\nb\x1bc\x8c\x01d\x93", r"'a\\nb\\x1bc\.d'"),
}


@pytest.mark.parametrize(("opcodes", "shown"), FOREIGN.values(), ids=FOREIGN)
def test_other_names_are_refused(tmp_path, opcodes, shown):
    content = torch_pickle({"x": opcodes}).replace(b"\x80\x02", b"\x80\x04", 1)
    torch_zip(tmp_path / "x.pt", content, [])
    with pytest.raises(CheckpointError, match=shown) as error:
        TorchFile(tmp_path / "x.pt")
    assert str(error.value).isprintable()


def test_ways_to_use_what_is_allowed_wrongly(tmp_path):
    """Calls of the three allowed things with anything, and building on the results."""
    rebuild, ordered = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"
    storage = b"ctorch\nFloatStorage\n"
    entry = torch_entry((4, 6), "F32", "0")
    for opcodes in (
        rebuild,
        ordered,
        storage,
        rebuild + b")R",
        rebuild + b"(NNNNtR",
        rebuild + b")\x81",
        storage + b")R",
        ordered + b"(NtR",
        ordered + b")R}\x8c\x08__init__Nsb",
        entry + b"}\x8c\x06shape_Nsb",
        entry + b"N}\x8c\x05shape(I9999999\nI9999999\ntss\x86b",
        b"NQ",
        b"(\x8c\x07storageNNNNtQ",
        b"(\x8c\x07storage" + storage + b"\x8c\x010\x8c\x03cpuNtQ",
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x96" + b"\xff" * 6 + b"\x0f\x00",
        b"(" * 100_000,
    ):
        content = torch_pickle({"x": opcodes}).replace(b"\x80\x02", b"\x80\x05", 1)
        torch_zip(tmp_path / "x.pt", content, [("0", BYTES)])
        try:
            file = TorchFile(tmp_path / "x.pt")
        except CheckpointError as error:
            assert str(error).isprintable()
        else:
            assert file.tensors["x"].shape == (4, 6)


def laughs(levels: int) -> bytes:
    """A tuple of two of the same tuple, and so on: 2**levels at the bottom."""
    steps = (bytes([*b"h", n, 0x86, *b"q", n + 1]) for n in range(levels))
    return b")q\x00" + b"".join(steps)


HOSTILE = {
    "laughs as key": (b"\x80\x02}" + laughs(60) + b"Ns.", "key of type tuple"),
    "laughs as keys": (b"\x80\x02}(" + laughs(60) + b"Nu.", "key of type tuple"),
    "laughs as value": (
        b"\x80\x02}\x8c\x01x" + laughs(60) + b"s.",
        "'x' is a tuple, expected a tensor",
    ),
    "laughs as shape": (
        torch_pickle({"x": torch_entry((4, 6), "F32", "0").replace(b"K\x04K\x06\x86", laughs(60))}),
        "'x' has no valid storage and shape",
    ),
    "laughs as storage": (b"\x80\x02" + laughs(60) + b"Q.", "an unknown kind of storage"),
    "deep key": (b"\x80\x02})" + b"\x85" * 400_000 + b"Ns.", "key of type tuple"),
    "deep value": (
        b"\x80\x02}\x8c\x01x)" + b"\x85" * 400_000 + b"s.",
        "'x' is a tuple, expected a tensor",
    ),
    "memo": (b"\x80\x02]r\xff\xff\xff\x1f.", "not a dictionary of tensors"),
    "opcodes": (b"\x80\x02" + b"N" * 600_000 + b".", "more than 500,000 opcodes"),
    "marks": (b"\x80\x02" + b"(" * 600_000 + b".", "more than 500,000 opcodes"),
    "bytes": (b"\x80\x02" + b"N" * 4_000_000 + b".", "data.pkl has more than 4,000,000 bytes"),
    "long key": (
        b"\x80\x02}X\x40\x42\x0f\x00" + b"x" * 1_000_000 + b"Ns.",
        "'xxxx.* is a NoneType, expected a tensor",
    ),
    "list that holds itself": (b"\x80\x02]q\x00h\x00a.", "not a dictionary of tensors"),
    "dictionary that holds itself": (
        b"\x80\x02}q\x00\x8c\x01xh\x00s.",
        "'x' is a dict, expected a tensor",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_take_bounded_time_and_memory(tmp_path, content, message):
    torch_zip(tmp_path / "x.pt", content, [("0", BYTES)])
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as error:
            convert(tmp_path / "x.pt", tmp_path / "out", **SAID)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 30 and peak < 200_000_000
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 250
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_hostile_zip_directories(tmp_path):
    """A directory, or an entry that is read whole, of any size."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", torch_pickle({"x": torch_entry((4, 6), "F32", "0")}))
        for number in range(25_000):
            archive.writestr(f"{number:0200d}", b"")
    with pytest.raises(CheckpointError, match="directory has more than 4,194,304 bytes"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", torch_pickle({"x": torch_entry((4, 6), "F32", "0")}))
        archive.writestr("x/byteorder", b"little" + b" " * 1000)
    with pytest.raises(CheckpointError, match="byteorder is too large"):
        TorchFile(path)


MISPLACED = {
    "offset": ({"offset": 1}, "does not lie in its storage"),
    "negative offset": ({"offset": -1}, "no valid strides and offset"),
    "huge offset": ({"offset": 1 << 70}, "no valid strides and offset"),
    "huge strides": ({"strides": (1 << 70, 1)}, "no valid storage and shape"),
    "many strides": ({"strides": (1,) * 1000}, "no valid storage and shape"),
    "no offset": ({"offset": "0"}, "no valid strides and offset"),
    "strides": ({"strides": (7, 1)}, "does not lie"),
    "negative strides": ({"strides": (-6, 1)}, "no valid storage and shape"),
    "few strides": ({"strides": (1,)}, "no valid strides"),
    "no strides": (
        {"strides": "x"},
        "no valid storage and shape",
    ),
}


@pytest.mark.parametrize(("changes", "message"), MISPLACED.values(), ids=MISPLACED)
def test_places_outside_the_storage(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        torch_file(tmp_path, {"x": torch_entry((4, 6), "F32", "0", **changes)})


def test_zero_strides_cannot_make_a_tensor_larger_than_its_storage(tmp_path):
    entry = torch_entry((4, 6), "F32", "0", strides=(0, 1))
    assert torch_file(tmp_path, {"x": entry}).read("x").shape == (4, 6)
    large = entry.replace(pickle.dumps((4, 6), 2)[2:-1], pickle.dumps((1 << 40, 6), 2)[2:-1])
    with pytest.raises(CheckpointError, match="does not lie in its storage"):
        torch_file(tmp_path, {"x": large})


def test_wrong_storages(tmp_path):
    with pytest.raises(CheckpointError, match="the storage of 'x' has 92 bytes"):
        torch_file(tmp_path, {"x": torch_entry((4, 6), "F32", "0")}, BYTES[:92])
    with pytest.raises(CheckpointError, match="the storage of 'x' is missing"):
        torch_file(tmp_path, {"x": torch_entry((4, 6), "F32", "../0")})
    with pytest.raises(CheckpointError, match="'x' is a int, expected a tensor"):
        torch_file(tmp_path, {"x": b"K\x01"})
    with pytest.raises(CheckpointError, match="'x' is a dict, expected a tensor"):
        torch_file(tmp_path, {"x": b"}"})
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        torch_file(tmp_path, {})
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        TorchFile(torch_zip(tmp_path / "x.pt", pickle.dumps([1]), []))


def test_other_dtypes_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(STORAGE, "F64", "DoubleStorage")
    file = torch_file(tmp_path, {"x": torch_entry((4, 3), "F64", "0")})
    assert file.tensors["x"].dtype == "F64"


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_compressed_file(tmp_path, suffix):
    with (
        zipfile.ZipFile(TORCH) as archive,
        zipfile.ZipFile(tmp_path / f"x{suffix}", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        convert(tmp_path / f"x{suffix}", tmp_path / "out", **SAID)


def test_checksums(tmp_path):
    """A flipped bit in a storage is found where it is read, for any of them."""
    shutil.copyfile(TORCH, tmp_path / "x.pt")
    with zipfile.ZipFile(TORCH) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("data/88"))
    content = bytearray(TORCH.read_bytes())
    content[entry.header_offset + 200] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        convert(tmp_path / "x.pt", tmp_path / "out", **SAID)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_big_endian(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", torch_pickle({"x": torch_entry((4, 6), "F32", "0")}))
        archive.writestr("x/byteorder", b"big")
    with pytest.raises(CheckpointError, match="big-endian"):
        TorchFile(tmp_path / "x.pt")


@pytest.mark.parametrize("module", [False, True], ids=["dictionary", "state_dict"])
def test_what_torch_writes(tmp_path, module):
    """Files of today's torch, with views, transposed tensors and shared storages."""
    torch = pytest.importorskip("torch", reason="torch is not installed (the extra 'parity')")
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    values = {
        "view": base[1:4, 2:7],
        "transposed": base.T,
        "bfloat16": base.to(torch.bfloat16),
        "float16": base.to(torch.float16),
    }
    if module:
        holder = torch.nn.Module()
        for name, value in values.items():
            holder.register_buffer(f"{name}_", value)
        values = holder.state_dict()
    torch.save(values, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    for name, value in values.items():
        found = mx.array(np.ascontiguousarray(file.read(name)))
        dtype = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}[
            file.tensors[name].dtype
        ]
        expected = value.float().numpy()
        assert np.array_equal(np.array(found.view(dtype).astype(mx.float32)), expected)


def test_legacy_file_is_refused(tmp_path):
    """As torch before 1.6 wrote them: pickles end to end, the first a magic number."""
    content = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    assert content.startswith(LEGACY_TORCH)
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"before version 1\.6.*save it again with torch.save"
    ):
        convert(tmp_path / "x.pt", tmp_path / "out", **SAID)
