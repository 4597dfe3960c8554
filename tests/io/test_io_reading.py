"""Reading files from outside: devices, pipes, sizes, and JSON that other code could not handle."""

from __future__ import annotations

import os
import threading
import tracemalloc

import pytest

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.reading import open_regular, read_json, read_limited, reason


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path):
        done = []

        def read(path=path, done=done):
            with pytest.raises(CheckpointError, match="not a regular file"):
                read_limited(path, 10)
            done.append(path)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(20)
        assert done, f"{path}: waits, or was read"


def test_a_small_file_takes_little_memory(tmp_path):
    (tmp_path / "x").write_bytes(bytes(10))
    tracemalloc.start()
    try:
        assert read_limited(tmp_path / "x", 1 << 30) == bytes(10)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_sizes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(10))
    assert read_limited(path, 10) == bytes(10)
    with pytest.raises(CheckpointError, match="x: 10 bytes, expected at most 9"):
        read_limited(path, 9)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(CheckpointError, match="expected at most"):
        read_json(path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_regular(tmp_path / "absent")


UNUSABLE = {
    "deep lists": ('{"a": ' + "[" * 60 + "]" * 60 + "}", "more than 50 levels"),
    "deep objects": ('{"a": ' * 60 + "1" + "}" * 60, "more than 50 levels"),
    "deeper than Python": ('{"a": ' + "[" * 500_000, "not valid JSON"),
    "4,000 digits": ('{"a": [[], {"b": ' + "9" * 4000 + "}]}", "more than 256 bits"),
    "5,000 digits": ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    "half a pair": (r'{"a": ["é", "\ud800"]}', "surrogate pair in a text"),
    "half a pair as key": (r'{"a": {"\udfff": 1}}', "surrogate pair in a key"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
}


@pytest.mark.parametrize(("content", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_json_that_other_code_could_not_handle(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message) as error:
        read_json(path)
    assert len(str(error.value)) < len(str(path)) + 100


def test_json_that_is_used(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"model_max_length": 1000000000000000019884624838656, "é": [[1, null], {}]}')
    assert read_json(path)["é"] == [[1, None], {}]


def test_reasons_are_one_bounded_line():
    assert reason(ValueError("a\n b")) == "a b"
    assert reason(KeyError()) == "KeyError"
    assert reason(ValueError("a\x1b[2J")) == r"a\x1b[2J"
    assert len(reason(ValueError("x" * 10**6))) < 400
