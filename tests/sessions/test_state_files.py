"""Saved states: under any name, in any way of saving; damaged and hostile files are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_rgemma import Session, cache_prompt, load, load_prompt_cache, register, save_prompt_cache
from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.io.safetensors import read_header
from mlx_rgemma.sessions.prompt_cache import MAX_HEADER_BYTES, MAX_METADATA_BYTES, PENDING

TEXT = "Once upon a time"
NAMES = ("book", "a.b", "x.safetensors", "dir/über", "x.npz")
LONGEST = "n" * 255
WAYS = ("session", "prompt cache", "command", "mlx-lm")

SAVE_AND_DIE = """
import os, signal, sys
import mlx.core as mx
from mlx_rgemma import Session, load

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(path, arrays, metadata):
    write(path, arrays, metadata)
    os.truncate(path, 50_000)
    die()

session = Session(*load())
session.feed("Another and longer text")
write = mx.save_safetensors
if sys.argv[2] == "half written":
    mx.save_safetensors = write_half
elif sys.argv[2] == "before the rename":
    os.replace = die
else:
    replace = os.replace
    os.replace = lambda source, target: (replace(source, target), die())
session.save(sys.argv[1])
"""

SAVE_TO_A_FULL_DISK = """
import resource, sys
from mlx_rgemma import Session, cache_prompt, load
from mlx_rgemma import cli

def save():
    session = Session(*load())
    session.feed("Once upon a time")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    session.save(sys.argv[1])

def read_and_save():
    feed = Session.feed
    def limited(*args, **kwargs):
        reading = feed(*args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return reading
    Session.feed = limited
    return cache_prompt.main(["--prompt", "Once", "--prompt-cache-file", sys.argv[1]])

sys.exit(cli.run(save) if sys.argv[2] == "save" else read_and_save())
"""


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.fixture
def session(embedded) -> Session:
    session = Session(*embedded)
    session.feed(TEXT)
    return session


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def save_in(way: str, session: Session, path: Path) -> None:
    if way == "session":
        session.save(path)
    elif way == "prompt cache":
        save_prompt_cache(path, session.model, session.prompt_cache())
    elif way == "command":
        assert cache_prompt.main(["--prompt", TEXT, "--prompt-cache-file", str(path)]) == 0
    else:
        from mlx_lm.models.cache import save_prompt_cache as mlx_lm_save

        register()
        mlx_lm_save(str(path), session.prompt_cache())


@pytest.mark.parametrize(
    ("way", "name"), [*product(WAYS, NAMES), ("session", LONGEST), ("command", LONGEST)]
)
def test_a_state_loads_again_under_any_name(session, tmp_path, way, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save_in(way, session, path)
    appended = way == "mlx-lm" and not name.endswith(".safetensors")
    assert files(tmp_path) == {f"{name}.safetensors" if appended else name}
    loaded = Session.load(str(path), session.model, session.tokenizer)
    assert loaded.tokens_seen == session.tokens_seen
    expected = [r.token for r in session.fork().stream(" there", max_tokens=5)]
    assert [r.token for r in loaded.stream(" there", max_tokens=5)] == expected
    assert load_prompt_cache(path, session.model)[0].offset == session.tokens_seen


def test_a_file_of_the_exact_name_comes_first(session, tmp_path):
    session.save(tmp_path / "book.safetensors")
    session.feed(" there")
    session.save(tmp_path / "book")
    seen = session.tokens_seen
    for name, expected in (("book", seen), ("book.safetensors", seen - 1)):
        loaded = Session.load(tmp_path / name, session.model, session.tokenizer)
        assert loaded.tokens_seen == expected
    (tmp_path / "book").write_text("my text")
    with pytest.raises(CheckpointError, match=r"book: .*(truncated|sound)"):
        Session.load(tmp_path / "book", session.model, session.tokenizer)


def test_mlx_lm_reads_what_is_saved(session, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache as mlx_lm_load

    register()
    session.metadata = {"title": "ü", "a.b": "dots", "0": "digits", "": "nothing", "c": "\n\x00"}
    session.save(tmp_path / "s.safetensors")
    cache, metadata = mlx_lm_load(str(tmp_path / "s.safetensors"), return_metadata=True)
    assert metadata["title"] == "ü"
    assert cache[0].offset == session.tokens_seen - 1
    loaded = Session.load(tmp_path / "s.safetensors", session.model, session.tokenizer)
    assert loaded.metadata == session.metadata


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": None}, {"a": "x" * 2_000_000}])
def test_metadata_that_could_not_be_loaded_are_not_saved(session, tmp_path, metadata):
    session.metadata = metadata
    with pytest.raises(UserError, match=r"^metadata: ") as error:
        session.save(tmp_path / "s")
    assert len(str(error.value)) < 200
    assert files(tmp_path) == set()


def test_the_longest_metadata_load_again(session, tmp_path):
    session.metadata = {"a": "\x00" * ((MAX_METADATA_BYTES - 200) // 6)}
    session.save(tmp_path / "s")
    assert Session.load(tmp_path / "s", session.model, session.tokenizer).metadata == (
        session.metadata
    )


def test_umask_permissions_and_links(session, tmp_path):
    before = os.umask(0o027)
    try:
        session.save(tmp_path / "book")
    finally:
        os.umask(before)
    assert (tmp_path / "book").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to("book")
    (tmp_path / "book").chmod(0o600)
    session.feed(" there")
    session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    loaded = Session.load(tmp_path / "book", session.model, session.tokenizer)
    assert loaded.tokens_seen == session.tokens_seen
    assert (tmp_path / "book").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("moment", ["half written", "before the rename", "after the rename"])
def test_killed_while_saving(session, tmp_path, moment):
    path = tmp_path / "book"
    session.save(path)
    old = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(path), moment], timeout=120)
    assert done.returncode == -signal.SIGKILL
    loaded = Session.load(path, session.model, session.tokenizer)
    if moment == "after the rename":
        assert loaded.tokens_seen != session.tokens_seen
        assert files(tmp_path) == {"book"}
    else:
        assert path.read_bytes() == old
        assert len(files(tmp_path)) == 2
    session.save(path)
    assert files(tmp_path) == {"book"}
    assert Session.load(path, session.model, session.tokenizer).tokens_seen == session.tokens_seen


@pytest.mark.parametrize("way", ["save", "cache_prompt"])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_is_one_line(tmp_path, way, before):
    """A limit on the size of files stands in for a full disk."""
    path = tmp_path / "book"
    if before is not None:
        path.write_text(before)
    command = [sys.executable, "-c", SAVE_TO_A_FULL_DISK, str(path), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}: ") and "Unable to write" in line
    assert files(tmp_path) == (set() if before is None else {"book"})
    assert before is None or path.read_text() == before


def test_each_flipped_bit_of_a_tensor_is_refused(session, tmp_path):
    path = tmp_path / "book"
    session.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    tensors = read_header(path)
    assert len(tensors) == 18
    for name, tensor in tensors.items():
        for at in (0, tensor.nbytes - 1, int(rng.integers(tensor.nbytes))):
            damaged = bytearray(whole)
            damaged[tensor.start + at] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"'{name}' is damaged") as error:
                Session.load(path, session.model, session.tokenizer)
            assert str(error.value).startswith(f"{path}: ") and str(error.value).isprintable()


def rewrite(path: Path, session: Session, change, header=()) -> None:
    """Write a session's state by hand, without checksums, after a change to its arrays."""
    cache = session.prompt_cache()
    arrays = dict(tree_flatten([layer.state for layer in cache]))
    change(arrays)
    names = [type(layer).__name__ for layer in cache]
    metadata = {**dict(tree_flatten([{"x": "y"}, names, [""]])), **dict(header)}
    mx.save_safetensors(f"{path}.safetensors", arrays, metadata)
    os.replace(f"{path}.safetensors", path)


def set_arrays(**values):
    return lambda arrays: arrays.update(
        {name[1:].replace("_", "."): v for name, v in values.items()}
    )


def every_position(value):
    def change(arrays):
        arrays.update({name: mx.array(np.array([value])) for name in arrays if name.endswith(".2")})

    return change


HOSTILE = {
    "negative position": every_position(-1),
    "position 2^62 + 1": every_position((1 << 62) + 1),
    "unsigned position": every_position(np.uint64((1 << 64) - 1)),
    "fractional position": every_position(1.5),
    "one position of two": set_arrays(_0_2=mx.array([7])),
    "two positions": set_arrays(_0_2=mx.array([5, 5])),
    "no rows": set_arrays(_0_0=mx.zeros((0, 96)), _0_1=mx.zeros((0, 3, 96)), _0_2=mx.zeros((0,))),
    "h of the wrong width": set_arrays(_0_0=mx.zeros((1, 1))),
    "h without rows": set_arrays(_0_0=mx.zeros((96,))),
    "h of integers": set_arrays(_0_0=mx.zeros((1, 96), mx.int32)),
    "conv of integers": lambda a: a.update({"0.1": a["0.1"].view(mx.int32)}),
    "conv complex": lambda a: a.update({"0.1": a["0.1"].astype(mx.complex64)}),
    "kv of bytes": lambda a: a.update({"2.0": mx.zeros(a["2.0"].shape, mx.uint8)}),
    "negative head": lambda a: a.update({"2.1": mx.array([-1, int(a["2.1"][1])])}),
    "head beyond the window": lambda a: a.update({"2.1": mx.array([10_000, int(a["2.1"][1])])}),
    "huge window": lambda a: a.update({"2.1": mx.array([0, (1 << 62) - 1])}),
    "a tensor less": lambda a: a.pop("0.2"),
    "a tensor more": lambda a: a.update({"0.3": mx.zeros((1,))}),
    "a layer less": lambda a: [a.pop(f"5.{i}") for i in range(3)],
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_numbers_and_shapes_are_refused(session, tmp_path, change):
    path = tmp_path / "book"
    rewrite(path, session, lambda arrays: None)
    assert Session.load(path, session.model, session.tokenizer).metadata == {"x": "y"}
    rewrite(path, session, change)
    with pytest.raises(CheckpointError) as error:
        Session.load(path, session.model, session.tokenizer)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).isprintable()


METADATA = {
    "token too large": {f"0.{PENDING}": "2048"},
    "negative token": {f"0.{PENDING}": "-1"},
    "token of 5,000 digits": {f"0.{PENDING}": "9" * 5000},
    "token of a million digits": {f"0.{PENDING}": "1" * 1_000_000},
    "token in other digits": {f"0.{PENDING}": "\u0661"},
    "empty token": {f"0.{PENDING}": ""},
    "fingerprint of escapes": {"0.fingerprint": "\x1b[2J\n" * 10_000},
    "unknown cache": {"1.0": "KVCache"},
    "another function": {"1.0": "load_prompt_cache"},
    "cache of escapes": {"1.0": "\x1b[2J\n" * 10_000},
    "a layer more": {"1.6": "RecurrentCache"},
    "nested checksums": {"0.crc32": "[" * 100_000},
    "checksums of other tensors": {"0.crc32": '{"0.0":"00000000"}'},
    "checksums in parts": {"0.crc32": "\x1b[2J\n" * 10_000},
    "long header": {"0.x": "x" * (MAX_HEADER_BYTES + 1)},
}


@pytest.mark.parametrize("header", METADATA.values(), ids=METADATA)
def test_hostile_metadata_are_refused(session, tmp_path, header):
    path = tmp_path / "book"
    rewrite(path, session, lambda arrays: None, header)
    with pytest.raises(CheckpointError) as error:
        Session.load(path, session.model, session.tokenizer)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    assert len(message) < len(str(path)) + 300


def test_a_nested_header_is_refused(session, tmp_path):
    text = b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"
    (tmp_path / "book").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="its header is not JSON"):
        Session.load(tmp_path / "book", session.model, session.tokenizer)


def test_what_is_no_file_is_not_read(session, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(CheckpointError, match="a folder, device or pipe"):
            Session.load(path, session.model, session.tokenizer)


def test_a_session_shows_its_size(session):
    assert repr(session) == "<Session: 5 tokens, 111,360 bytes>"
