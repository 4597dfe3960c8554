"""What lora and fuse have to do with the world outside: data sets, services, the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from helpers.fake_hub import TOKEN, upload_hub

import mlx_rgemma.lora as lora
from mlx_rgemma import load
from mlx_rgemma.adapters.files import (
    AdapterConfig,
    add_adapters,
    save_adapter_config,
    save_adapter_weights,
)
from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.data.datasets import read_examples

CAPITALS = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Peru": "Lima", "Cuba": "Havana"}


@pytest.fixture
def questions(tmp_path):
    """One of the Hub's data sets, as far as its own library tells it from a local one."""
    pytest.importorskip("datasets")
    file = tmp_path / "questions.jsonl"
    rows = [{"question": f"Capital of {a}?", "answer": f" {b}."} for a, b in CAPITALS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "path": "json",
        "config": {"data_files": {"train": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "prompt_feature": "question",
        "completion_feature": "answer",
    }


def read(hf_dataset, **others):
    _, tokenizer = load()
    values = {"train": True, "test": False, "data": None, "mask_prompt": True}
    found = read_examples(
        SimpleNamespace(**{**values, "hf_dataset": hf_dataset, **others}), tokenizer
    )
    return {
        split: [tokenizer.decode(ids) for ids in _split(documents)]
        for split, documents in found.items()
    }


def _split(documents):
    """The targets of each document that count."""
    for number, first in enumerate(documents.first_targets):
        start, stop = documents.offsets[number : number + 2]
        yield documents.ids[start + first : stop - 1].tolist()


def test_hf_dataset(questions):
    found = read(questions)
    assert [text.strip() for text in found["train"]] == ["Paris.", "Madrid.", "Rome.", "Lima."]
    assert not found["test"]  # mlx-lm trains on 80 %, unless it is told otherwise
    splits = {"train": "train[1:3]", "valid": "train[:1]", "test": "train[-1:]"}
    wanted = {f"{split}_split": rows for split, rows in splits.items()}
    found = read({**questions, **wanted}, test=True)
    assert [text.strip() for text in found["train"]] == ["Madrid.", "Rome."]
    assert [text.strip() for text in found["valid"]] == ["Paris."]
    assert [text.strip() for text in found["test"]] == ["Havana."]


def test_several_data_sets_are_one(questions):
    texts = {key: value for key, value in questions.items() if not key.endswith("feature")}
    found = read([questions, {**texts, "text_feature": "question"}], mask_prompt=False)
    assert len(found["train"]) == 8
    assert found["train"][0].endswith("Paris.") and found["train"][4].endswith("France?")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "hf_dataset: path is None, expected a name"),
        ({"path": "no/such/place"}, "hf_dataset: cannot be loaded"),
        ({"train_splt": "train"}, "unknown setting train_splt; did you mean train_split?"),
        ({"train_split": "nothing"}, "hf_dataset: cannot be loaded"),
        ({"prompt_feature": "prompt"}, "hf_dataset: cannot be loaded .*Unsupported data format"),
        ({"config": 3}, "config is 3, expected names with values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_data_sets_that_cannot_be(questions, changes, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        read({**questions, **changes})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="test_split is None, expected a name"):
        read(questions, test=True)


def test_an_unreachable_hub_is_one_line(tmp_path):
    pytest.importorskip("datasets")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_rgemma.lora", "--train", "--data", "me/questions"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: me/questions: no such folder, and as a data set")
    assert done.stderr.count("\n") == 1


class Service:
    """What mlx-lm's callbacks use of wandb."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem, self.begun, self.logged, self.finished = problem, [], [], 0

    def init(self, **settings):
        if self.problem is not None:
            raise self.problem
        self.begun.append(settings)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def training(questions, tmp_path):
    """Arguments of a short run whose data, and project, are in a configuration file."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.dump({"hf_dataset": questions, "project_name": "capitals"}))
    words = ["-c", config, "--train", "--iters", 4, "--steps-per-report", 2, "--batch-size", 2]
    return [str(word) for word in [*words, "--adapter-path", tmp_path / "adapters"]]


def test_reports_go_to_a_service_and_the_terminal(training, tmp_path, monkeypatch, capsys):
    from mlx_lm.tuner import callbacks

    service = Service()
    monkeypatch.setattr(callbacks, "wandb", service)
    assert lora.main([*training, "--report-to", "wandb"]) == 0
    (begun,) = service.begun
    assert begun["project"] == "capitals" and begun["dir"] == str(tmp_path / "adapters")
    assert begun["config"]["iters"] == 4
    trained = [(step, v["train_loss"]) for step, v in service.logged if "train_loss" in v]
    assert [step for step, _ in trained] == [2, 4] and service.finished == 1
    printed = capsys.readouterr().out
    for step, loss in trained:
        assert f"Iter {step}: Train loss {loss:.3f}" in printed


@pytest.mark.parametrize(
    ("service", "message"),
    [
        (None, "error: --report-to: wandb is not installed: pip install wandb."),
        (
            Service(RuntimeError("api_key not configured\nrun wandb login")),
            "error: --report-to wandb: cannot begin (api_key not configured run wandb login).",
        ),
    ],
    ids=["missing", "no login"],
)
def test_a_service_that_is_not_there(training, service, message, monkeypatch, capsys):
    from mlx_lm.tuner import callbacks

    monkeypatch.setattr(callbacks, "wandb", service)
    assert lora.main([*training, "--report-to", "wandb"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.fixture
def adapters(tmp_path):
    """Untrained ones: what they compute does not matter here."""
    from mlx.utils import tree_flatten

    model, _ = load()
    config = AdapterConfig(num_layers=-1, rank=2, scale=1.0)
    add_adapters(model, config)
    weights = dict(tree_flatten(model.trainable_parameters()))
    folder = tmp_path / "adapters"
    folder.mkdir()
    save_adapter_weights(folder / "adapters.safetensors", weights)
    save_adapter_config(folder, {"num_layers": -1, "lora_parameters": config.lora_parameters})
    return folder


def fuse(folder, *arguments, **environment):
    """In a process of its own, which reads the Hub's address when it starts."""
    settings = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-m", "mlx_rgemma.fuse", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **settings, **environment},
    )


def test_a_fused_model_is_uploaded(adapters, tmp_path):
    with upload_hub() as hub:
        done = fuse(tmp_path, "--upload-repo", "me/tuned", HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert f"Uploaded to {hub.endpoint}/me/tuned." in done.stdout
    written = {f.name: f.read_bytes() for f in (tmp_path / "fused_model").iterdir()}
    assert hub.files == {"me/tuned": written}
    assert {"config.json", "model.safetensors", "README.md"} <= set(written)


def test_an_impossible_upload_is_refused_before_any_work(adapters, tmp_path):
    for name, environment, message in (
        ("nobody", {}, "upload-repo is 'nobody', expected owner/name."),
        ("me/x", {"HF_TOKEN": ""}, "upload-repo: log in first, with 'hf auth login'."),
    ):
        done = fuse(tmp_path, "--upload-repo", name, **environment)
        assert (done.returncode, done.stderr) == (1, f"error: {message}\n")
    assert not (tmp_path / "fused_model").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--q-bits", 4], "need -q"),
        (["-q", "--q-bits", 9], "q-bits is 9; with q-mode affine it must be"),
        (["-q", "--q-mode", "mxfp5"], "q-mode is 'mxfp5', expected one of affine"),
    ],
    ids=["no -q", "bits", "mode"],
)
def test_quantizations_that_cannot_be(adapters, tmp_path, flags, message, capsys):
    from mlx_rgemma import fuse as command

    target = tmp_path / "fused"
    words = ["--adapter-path", adapters, "--save-path", target, *flags]
    assert command.main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not target.exists()
