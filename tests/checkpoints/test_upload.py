"""Uploads, to a stand-in for the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.checkpoint_files import golden_copy
from helpers.fake_hub import TOKEN, upload_hub

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.hub import EMBEDDED


def run(
    folder: Path, *arguments: object, module: str = "mlx_rgemma.convert", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run convert in a process of its own, which reads the Hub's address when it starts."""
    settings = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **settings, **environment},
        timeout=120,
    )


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """A conversion that was uploaded, with its report."""
    folder = tmp_path_factory.mktemp("upload")
    (folder / "text.txt").write_text("Once upon a time there was a cat.")
    source = ["--model", EMBEDDED, "-q", "--report", "text.txt"]
    with upload_hub() as hub:
        command = [*source, "--upload-repo", "me/story-4bit", "--mlx-path", "out"]
        done = run(folder, *command, HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    return folder / "out", hub, done.stdout


def test_the_repository_is_the_folder(uploaded):
    folder, hub, printed = uploaded
    assert list(hub.files) == ["me/story-4bit"]
    assert hub.files["me/story-4bit"] == {f.name: f.read_bytes() for f in folder.iterdir()}
    assert f"Uploaded to {hub.endpoint}/me/story-4bit." in printed
    assert len(hub.objects) == 1  # the weights went as a large file


def test_model_card(uploaded):
    _, hub, _ = uploaded
    card = hub.files["me/story-4bit"]["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["library_name"] == "mlx" and {"mlx", "recurrent_gemma"} <= set(values["tags"])
    assert values["license"] == "apache-2.0" and values["pipeline_tag"] == "text-generation"
    assert "quantized (4 to 5 bits, groups of 64), the rest bfloat16" in text
    assert "mlx_rgemma.generate --model me/story-4bit" in text
    assert 'load("me/story-4bit")' in text and "mlx_lm.generate --model me/story-4bit" in text
    assert (
        "<this folder>" not in card
        and "## Quality" in text
        and "quality.json" in hub.files["me/story-4bit"]
    )


def test_from_python_with_a_released_model_s_card(tmp_path):
    source = golden_copy("tiny-2b", tmp_path).rename(tmp_path / "recurrentgemma-2b-it")
    code = (
        "from mlx_rgemma import convert\n"
        f"convert({str(source)!r}, 'out', upload_repo='me/rgemma-2b-it')"
    )
    (tmp_path / "upload_it.py").write_text(code)
    with upload_hub() as hub:
        done = run(tmp_path, module="upload_it", HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    header = yaml.safe_load(hub.files["me/rgemma-2b-it"]["README.md"].decode().split("---\n")[1])
    assert header["base_model"] == "google/recurrentgemma-2b-it" and header["license"] == "gemma"


def test_what_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch):
    from mlx_rgemma import convert

    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    for name, message in {
        "no-owner": "'no-owner', expected owner/name",
        "a/b/c": "upload-repo: Repo id must be",
        "me/what a name": "upload-repo: Repo id must",
    }.items():
        with pytest.raises(UserError, match=message):
            convert(EMBEDDED, tmp_path / "out", upload_repo=name)
    assert list(tmp_path.iterdir()) == []


NO_TOKEN = {"HF_TOKEN": "", "HF_ENDPOINT": "http://127.0.0.1:9"}


def test_without_a_login(tmp_path):
    command = ["--model", EMBEDDED, "--mlx-path", "out", "--upload-repo", "me/x"]
    done = run(tmp_path, *command, **NO_TOKEN)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr == "error: upload-repo: log in first, with 'hf auth login'.\n"


@pytest.mark.parametrize(
    ("repository", "environment"),
    [("others/x", {}), ("me/x", {"HF_TOKEN": "wrong"})],
    ids=["another's", "wrong token"],
)
def test_a_refused_upload_leaves_the_folder(tmp_path, repository, environment):
    with upload_hub() as hub:
        command = ["--model", EMBEDDED, "--mlx-path", "out", "--upload-repo", repository]
        done = run(tmp_path, *command, HF_ENDPOINT=hub.endpoint, **environment)
    assert done.returncode == 1 and hub.files == {}
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"error: {repository}: cannot be uploaded (")
    assert f"try again with 'hf upload {repository} out'" in message
    assert (tmp_path / "out" / "config.json").is_file()
