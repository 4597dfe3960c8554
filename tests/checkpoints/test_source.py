"""Where checkpoints come from: folders, and repositories on a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoint_files import golden_copy
from helpers.fake_hub import hub

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.hub import EMBEDDED, Source, locate

LOCATE = """
import json, sys
from mlx_rgemma.io.hub import locate
from mlx_rgemma.errors import CheckpointError
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        answers.append(["folder", str(locate(name, revision).folder)])
    except CheckpointError as error:
        answers.append(["error", str(error)])
print(json.dumps(answers))
"""


def ask(home: Path, questions: list, **environment: str) -> list[tuple[str, str]]:
    """What `locate` says in a process of its own, which reads the Hub's address when it starts."""
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, json.dumps(questions)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(answer) for answer in json.loads(done.stdout)]


def test_embedded():
    assert locate(None) == Source(EMBEDDED)
    assert EMBEDDED.is_dir()


def test_folders(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("owner/name") == Source(Path("owner/name"))
    assert locate(tmp_path / "owner") == Source(tmp_path / "owner")
    assert locate("~/owner").folder == tmp_path / "owner"
    assert locate("owner/name").name == "name"


@pytest.mark.parametrize(
    "path", ["absent", "./absent", "/absent/x", "a/b/c", "../absent", Path("owner/name")]
)
def test_missing_folders_are_not_asked_for_elsewhere(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder") as error:
        locate(path)
    assert str(path).removeprefix("./") in str(error.value)


def test_empty_path():
    with pytest.raises(CheckpointError, match="is empty"):
        locate("")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """One visit to a Hub with an open, a gated and no other repository, then to none."""
    home = tmp_path_factory.mktemp("hub")
    folder = golden_copy("tiny-sharded", home / "published")
    shutil.copyfile(EMBEDDED / "tokenizer.model", folder / "tokenizer.model")
    for name in ("model.bin", "code.py", "README.md", "original.safetensors"):
        (folder / name).write_bytes(b"x")
    repositories = {"tiny/open": folder, "google/gated": None}
    questions = {
        "open": ("tiny/open", None),
        "gated": ("google/gated", None),
        "absent": ("tiny/absent", None),
        "revision": ("tiny/open", "no-such-revision"),
        "malformed": ("tiny/a..b", None),
    }
    with hub(repositories) as (endpoint, requests):
        found = ask(home, list(questions.values()), HF_ENDPOINT=endpoint)
        asked = list(requests)
    answers = dict(zip(questions, found, strict=True))
    again = [("tiny/open", None), ("tiny/other", None)]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    answers["cached"], answers["unreachable"] = ask(home, again, **nowhere)
    answers["offline"] = ask(home, again[1:], HF_HUB_OFFLINE="1")[0]
    return answers, asked


def test_repository(answers):
    kind, folder = answers[0]["open"]
    assert kind == "folder"
    names = {file.name for file in Path(folder).iterdir()}
    assert {"config.json", "tokenizer.model", "model.safetensors.index.json"} <= names
    assert {"model.bin", "code.py", "original.safetensors"}.isdisjoint(names)
    assert answers[0]["cached"] == answers[0]["open"]
    assert any("/resolve/" in path for path in answers[1])


ERRORS = {
    "gated": ["licence must be accepted", "https://huggingface.co/google/gated", "hf auth login"],
    "absent": ["tiny/absent", "neither a folder here nor a repository", "hf auth login"],
    "revision": ["tiny/open: has no revision 'no-such-revision'"],
    "malformed": ["tiny/a..b"],
    "unreachable": ["tiny/other", "cannot be reached"],
    "offline": ["tiny/other", "cannot be reached"],
}


@pytest.mark.parametrize(("question", "parts"), ERRORS.items(), ids=ERRORS)
def test_errors(answers, question, parts):
    kind, message = answers[0][question]
    assert kind == "error"
    assert "\n" not in message
    for part in parts:
        assert part in message
