"""Files of settings from anywhere: one line for each that cannot be, before anything is built."""

from __future__ import annotations

import os

import pytest

import mlx_rgemma.lora as lora
import mlx_rgemma.train as train
from mlx_rgemma.errors import UserError
from mlx_rgemma.io.yaml import MAX_BYTES, read_yaml

LAUGHS = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)


@pytest.mark.parametrize("command", [lora, train], ids=["lora", "train"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("iters: &x [*x]", "line 1: aliases (*) are not supported"),
        (LAUGHS, "line 2: aliases (*) are not supported"),
        ("iters: " + "9" * 5000, "line 1: a number of 5000 characters"),
        ("iters: 0x" + "f" * 300, "line 1: a number out of range"),
        ("iters: 1000000000000000000", "is not at most 1000000000"),
        ("iters: 1:30", "line 1: a number with colons"),
        ("learning_rate: .nan", "line 1: a number out of range"),
        ("learning_rate: [.inf]", "line 1: a number out of range"),
        ("learning_rate: inf", "learning_rate is 'inf': inf is not between 0 and 1e+30"),
        ("learning_rate: 1e999", "learning_rate is '1e999': inf is not between 0 and 1e+30"),
        ("learning_rate: nan", "learning_rate is 'nan': nan is not between 0 and 1e+30"),
        ("seed: 99999999999999999999", "line 1: a number out of range"),
        ("seed: 4294967296", "4294967296 is not at most 4294967295"),
        ("seed: -1", "-1 is not at least 0"),
        ("batch_size: 99999999999", "99999999999 is not at most"),
        ("data: " + "[" * 5000, "line 1: nested too deeply"),
        ("data: " + "[" * 30 + "]" * 30, "line 1: nested too deeply"),
        ("data: !!binary aGVsbG8=", "line 1: tags (!) are not supported"),
        ("data: !!python/object/apply:os.system [ls]", "line 1: tags (!) are not supported"),
        ('data: "a\\0b"', "line 1: text with NUL"),
        ('data: "\\ud800"', "line 1: text with NUL or half of a surrogate pair"),
        ("1: 2", "line 1: a key that is not text"),
        ('"\\UFFFFFFFF": 1', "an invalid escape"),
        ("iters: 1\niters: 2", "line 2: the same key twice"),
        ("x" * 1000 + ": 1", "unknown setting xxx"),
        ("iters: " + "x" * 100_000, "iters is 'xxx"),
        ("#" * (MAX_BYTES + 1), "200,001 bytes, expected at most 200,000"),
        (b"iters: \xff", "not UTF-8 text"),
        ("", "expected lines of the form key: value"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_payloads_are_refused_in_one_line(command, content, message, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command.main(["-c", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and message in error
    assert error.count("\n") == 1 and len(error) < 600
    assert list(tmp_path.iterdir()) == [file]


def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            train.read_config(["-c", str(file)])
        with pytest.raises(UserError, match="not a regular file"):
            lora.settings(lora.build_parser().parse_args(["-c", str(file)]))


def test_plain_values_are_what_they_say(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("a: [1, 2.5, x, {b: null}]\nc: yes\nd: 2001-01-01\ne: 0x10\nf: 1e-4\n")
    assert read_yaml(file) == {
        "a": [1, 2.5, "x", {"b": None}],
        "c": True,
        "d": "2001-01-01",
        "e": 16,
        "f": "1e-4",
    }


@pytest.mark.parametrize("command", [lora, train], ids=["lora", "train"])
@pytest.mark.parametrize(
    "option",
    [("--seed", "99999999999999999999"), ("--iters", "9" * 30), ("--learning-rate", "inf")],
    ids=lambda option: option[0],
)
def test_numbers_of_the_command_line_have_ranges(command, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.build_parser().parse_args(list(option))
    assert stopped.value.code == 2
    assert f"argument {option[0]}: {option[1]} is not" in capsys.readouterr().err
