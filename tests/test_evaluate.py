"""Evaluation: local tasks through the harness, figures against a full pass, batches against one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rgemma import convert, generate, load
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluate import build_parser, main
from mlx_rgemma.evaluation.harness import evaluate, results_table
from mlx_rgemma.io.hub import EMBEDDED

TASKS = Path(__file__).parent / "tasks"
CHOICE, STORY = "animals_choice", "animals_story"


def test_without_the_harness_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["--tasks", CHOICE, "--output-dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the lm-evaluation-harness is not installed: pip install")
    assert message.count("\n") == 1


def test_flags_are_those_of_mlx_lm():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {
        *("--model", "--tasks", "--output-dir", "--batch-size", "--num-shots", "--max-tokens"),
        *("--limit", "--seed", "--fewshot-as-multiturn", "--apply-chat-template", "--temp"),
        *("--chat-template-args", "--confirm-run-unsafe-code", "--top-p", "--top-k"),
        "--trust-remote-code",
    } <= flags


@pytest.mark.parametrize("value", ["{", "[1]"])
def test_wrong_template_arguments(capsys, value):
    with pytest.raises(SystemExit) as stop:
        main(["--tasks", CHOICE, "--chat-template-args", value])
    assert stop.value.code == 2
    assert "--chat-template-args" in capsys.readouterr().err


def test_table():
    results = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,x": 1.0}}
    lines = results_table(results).splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["a", "acc (none)", "0.5000", "0.1000"],
        ["a", "f1 (x)", "1.0000", ""],
    ]


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="needs the extra: pip install '.[evaluate]'")


@pytest.fixture
def in_tasks(harness, monkeypatch, tmp_path):
    """The tasks' files are found from their own folder; nothing is downloaded."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def run(tasks, **options):
    model, tokenizer = load()
    options = {"include_path": TASKS, "log_samples": True, **options}
    return evaluate(model, tokenizer, tasks, **options)


def test_log_likelihoods_are_those_of_a_full_pass(in_tasks):
    found = run([CHOICE])
    model, tokenizer = load()
    right = 0
    assert len(found["samples"][CHOICE]) == 5
    for sample in found["samples"][CHOICE]:
        doc = sample["doc"]
        scores = []
        for choice in doc["choices"]:
            prefix = tokenizer.encode(doc["question"])
            tokens = tokenizer.encode(f"{doc['question']} {choice}")
            logits = np.array(model(mx.array([tokens[:-1]])))[0].astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            chosen = logp[np.arange(len(tokens) - 1), tokens[1:]]
            scores.append(chosen[len(prefix) - 1 :].sum())
        theirs = [response[0] for response in sample["filtered_resps"]]
        np.testing.assert_allclose([float(score) for score in theirs], scores, atol=2e-3)
        right += int(np.argmax(scores) == doc["answer"])
    assert found["results"][CHOICE]["acc,none"] == right / 5


def test_batched_answers_are_those_of_each_alone(in_tasks):
    """Prompts of unequal length together; mlx-lm's own class answers the shorter ones wrongly."""
    answers = []
    for batch_size in (1, 3):
        found = run([STORY], batch_size=batch_size)
        samples = sorted(found["samples"][STORY], key=lambda sample: sample["doc_id"])
        answers.append([sample["resps"][0][0] for sample in samples])
    assert answers[0] == answers[1]
    model, tokenizer = load()
    docs = [json.loads(line) for line in (TASKS / f"{STORY}.jsonl").read_text().splitlines()]
    alone = [generate(model, tokenizer, doc["begin"], max_tokens=12) for doc in docs]
    assert answers[0] == [text.split(".")[0] for text in alone]
    assert len(set(alone)) == 5


def test_command(in_tasks, tmp_path, capsys):
    convert(EMBEDDED, tmp_path / "q8", quantize=True, q_bits=8)
    command = ["--model", str(tmp_path / "q8"), "--tasks", CHOICE, "--include-path", "."]
    assert main([*command, "--limit", "2", "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    cells = [cell.strip() for cell in printed.split("|")]
    assert cells[cells.index(CHOICE) + 1] == "acc (none)"
    (file,) = (tmp_path / "out").iterdir()
    assert file.name.endswith(f"_{CHOICE}.json") and str(file) in printed
    results = json.loads(file.read_text())["results"]
    assert 0 <= results[CHOICE]["acc,none"] <= 1


def test_few_shots(in_tasks):
    """A question after an example."""
    (sample,) = run([CHOICE], num_shots=1, limit=1)["samples"][CHOICE]
    prompt = sample["arguments"][0][0]
    assert prompt.endswith(sample["doc"]["question"])
    assert len(prompt) > len(sample["doc"]["question"]) + 10 and "\n\n" in prompt


def test_unknown_task(in_tasks):
    with pytest.raises(UserError, match="there is no task 'no_such_task'; see 'lm-eval ls tasks'"):
        run([CHOICE, "no_such_task"])
