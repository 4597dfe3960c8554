"""Folders of training runs: one run at a time, files of one run only, nothing after a failure."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import mlx.core as mx
import pytest

import mlx_rgemma.lora as lora
import mlx_rgemma.train as train
from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.run_folder import LOCK_FILE, run_folder

EXAMPLES = '{"text": "Ann and Ben saw a cat and a dog in the park"}\n' * 4
TINY = [
    *("--hidden-size", "32", "--num-hidden-layers", "3", "--num-attention-heads", "2"),
    *("--attention-window-size", "16", "--context-length", "16", "--batch-size", "2"),
]


@pytest.fixture
def commands(tmp_path):
    """Arguments of both commands but for the folder's, by module."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text(EXAMPLES)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Ann saw cat {n} and dog." for n in range(200)))
    return {
        lora: [
            *("--train", "--data", f"{tmp_path}/data", "--num-layers", "1", "--batch-size", "1"),
            "--adapter-path",
        ],
        train: ["--data", f"{tmp_path}/text.txt", *TINY, "--save-path"],
    }


def started(module, *arguments) -> subprocess.Popen[str]:
    name = f"mlx_rgemma.{module.__name__.rpartition('.')[2]}"
    return subprocess.Popen(
        [sys.executable, "-u", "-m", name, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}: {process.stderr.read()}")


@pytest.mark.parametrize("module", [lora, train], ids=["lora", "train"])
def test_a_second_run_in_the_folder_is_refused_at_once(module, commands, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*commands[module], str(folder)]
    first = started(module, *arguments, "--iters", 100000)
    try:
        wait_for(first, "Iter 10:")
        assert module.main([*arguments, "--iters", "5", "--seed", "7"]) == 1
        out, error = capsys.readouterr()
        assert out == ""  # before anything is loaded
        assert error == (
            f"error: {folder}: another run is training in this folder; wait until it ends, or name"
            " another folder.\n"
        )
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate()
    assert not (folder / LOCK_FILE).exists()
    with run_folder(folder):  # the lock has gone with the process
        pass


@pytest.mark.parametrize("module", [lora, train], ids=["lora", "train"])
def test_a_run_killed_before_its_first_checkpoint_begins_again(module, commands, tmp_path, capsys):
    resume = ["--resume"] if module is lora else []
    for name in ("killed", "whole"):
        arguments = [*commands[module], str(tmp_path / name), "--iters", "6"]
        if name == "killed":
            first = started(module, *arguments, "--steps-per-report", 1)
            wait_for(first, "Iter 2:")
            first.kill()
            first.communicate()
            assert (tmp_path / name / LOCK_FILE).exists()  # not locked any more
        assert module.main([*arguments, *resume]) == 0
    said = "No training_state.safetensors in" in capsys.readouterr().out
    assert said == (module is lora)
    file = "adapters.safetensors" if module is lora else "model/model.safetensors"
    killed, whole = (mx.load(str(tmp_path / name / file)) for name in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert all(mx.array_equal(killed[name], whole[name]) for name in whole)


def test_living_writers_keep_their_files(commands, tmp_path):
    """A temporary file is removed if its writer is dead, and only then."""
    folder = tmp_path / "run"
    folder.mkdir()
    alive, dead = (
        folder / f".training_state.safetensors.partial-0000000{n}.safetensors" for n in (1, 2)
    )
    for file in (alive, dead):
        file.write_bytes(b"half")
    with alive.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert lora.main([*commands[lora], str(folder), "--iters", "1"]) == 0
    assert alive.exists() and not dead.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_disks_without_locks_give_one_warning(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    said: list[str] = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_folder(tmp_path / "a/b", show=said.append):
        assert (tmp_path / "a/b").is_dir()
    assert len(said) == 1 and "is on a disk without file locks" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_only_empty_folders_are_removed(tmp_path):
    with run_folder(tmp_path / "a/b"), pytest.raises(UserError), run_folder(tmp_path / "a/b"):
        raise AssertionError("locked")
    assert not (tmp_path / "a").exists()
    with run_folder(tmp_path / "a/b"):
        (tmp_path / "a/b/file").touch()
    assert [file.name for file in (tmp_path / "a/b").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with run_folder(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_files_of_two_runs_are_refused(commands, tmp_path, capsys):
    """As a run that is killed between its first two files leaves them."""
    for seed in ("1", "2"):
        folder = str(tmp_path / seed)
        assert lora.main([*commands[lora], folder, "--iters", "1", "--seed", seed]) == 0
    config = tmp_path / "1/adapter_config.json"
    config.write_text((tmp_path / "2/adapter_config.json").read_text())
    test = ["--test", "--data", f"{tmp_path}/data", "--adapter-path"]
    (tmp_path / "data/test.jsonl").write_text(EXAMPLES)
    capsys.readouterr()
    assert lora.main([*test, str(tmp_path / "1")]) == 1
    error = capsys.readouterr().err
    assert f"{config}: of another run than adapters.safetensors" in error
    assert error.count("\n") == 1
    assert lora.main([*test, str(tmp_path / "2")]) == 0


def test_a_run_that_fails_leaves_the_adapters_before_it(commands, tmp_path, capsys):
    """Nothing is written before there are weights: until then the folder is the old run's."""
    folder = tmp_path / "run"
    arguments = [*commands[lora], str(folder), "--iters", "2"]
    assert lora.main(arguments) == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    exploding = ["--learning-rate", "1e30", "--optimizer", "sgd", "--iters", "9", "--seed", "4"]
    assert lora.main([*arguments, *exploding]) == 1
    assert "the loss became" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_run_that_cannot_begin_leaves_no_folder(commands, tmp_path, capsys):
    small = tmp_path / "small.txt"
    small.write_text("a b c\n\nd e f")
    folder = tmp_path / "new/run"
    for arguments in (
        ["--data", str(small), *TINY],
        ["--data", str(small), *TINY, "--vocab-size", "2000"],
        [*commands[train][:-1], "--num-attention-heads", "5"],
        [*commands[train][:-1], "--context-length", "90000"],
        [*commands[train][:-1], "--init-from", "embedded", "--tokenizer", str(small)],
    ):
        assert train.main([*arguments, "--save-path", str(folder)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert not folder.parent.exists()
    assert lora.main([*commands[lora], str(folder), "--num-layers", "99"]) == 1
    assert not folder.parent.exists()


def test_the_configuration_says_which_run_it_is_of(commands, tmp_path):
    runs = []
    for name, options in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        assert lora.main([*commands[lora], f"{tmp_path}/{name}", "--iters", "1", *options]) == 0
        values = json.loads((tmp_path / name / "adapter_config.json").read_text())
        runs.append(values["run_digest"])
        _, metadata = mx.load(f"{tmp_path}/{name}/adapters.safetensors", return_metadata=True)
        assert metadata["run_digest"] == runs[-1]
    assert runs[0] == runs[1] != runs[2]
