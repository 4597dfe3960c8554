"""The command `train`: from text files to a model that runs everywhere."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_rgemma.train import main

NAMES = ("Ann", "Ben", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal")
THINGS = ("a red ball", "an old hat", "a small bird", "the tall tree", "two green apples")

TINY = [
    *("--vocab-size", "200", "--hidden-size", "32", "--num-hidden-layers", "3"),
    *("--num-attention-heads", "2", "--attention-window-size", "16"),
    *("--context-length", "32", "--batch-size", "2", "--iters", "6", "--warmup", "2"),
    *("--steps-per-report", "3", "--steps-per-eval", "3", "--steps-per-save", "2"),
    *("--dropout", "0.1", "--average-decay", "0.9", "--sample-tokens", "5"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with one file of text, and one that is compressed."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)

    def story() -> str:
        who, what = rng.choice(NAMES), rng.choice(THINGS)
        return f"One day {who} found {what}.\n{who} was glad, and took {what} home for the night."

    (folder / "a.txt").write_text("\n\n".join(story() for _ in range(60)))
    (folder / "b.txt.xz").write_bytes(
        lzma.compress("\n\n".join(story() for _ in range(20)).encode())
    )
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    plot = ["--plot", str(folder / "plot.svg")] if _has_matplotlib() else []
    assert main(["--data", str(text), "--save-path", str(folder), *TINY, *plot]) == 0
    return folder


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_the_run_is_logged(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "train_loss" in line] == [3, 6]
    assert [line["iteration"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert lines[-2]["trained_tokens"] == 6 * 2 * 32
    assert all(
        line["val_bits_per_byte"] > 0 and "sample" in line for line in lines if "val_loss" in line
    )
    if _has_matplotlib():
        assert (trained / "plot.svg").read_text().count("<path") > 10


def test_the_model_runs_here_and_in_plain_mlx_lm(trained):
    from mlx_rgemma import load

    model, tokenizer = load(trained / "model")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    tokens = tokenizer.encode("Ann found a red bird.\nBen")
    assert tokens[0] == 2 and tokenizer.decode(tokens[1:]) == "Ann found a red bird.\nBen"
    assert model.args.vocab_size == 200 == len(tokenizer.get_vocab())
    mine = model(mx.array([tokens]))
    stored = mx.load(str(trained / "model/model.safetensors"))
    assert stored["model.layers.0.temporal_block.conv_1d.weight"].shape == (32, 1, 4)  # as torch's
    code = (
        "import sys, mlx.core as mx, numpy as np\n"
        "from mlx_lm.models import recurrent_gemma\n"
        "from mlx_lm.utils import load_model\n"
        "from pathlib import Path\n"
        "recurrent_gemma.RGLRU._no_grad = set()\n"
        "model, _ = load_model(Path(sys.argv[1]))\n"
        "model.set_dtype(mx.float32)\n"
        f"print(model(mx.array([{tokens}]))[0, -1].tolist())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(trained / "model")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    theirs = np.array(json.loads(run.stdout))
    # mlx-lm has another epsilon, and does not round the embedding's scale.
    assert np.abs(np.array(mine[0, -1]) - theirs).max() < 0.05


def test_a_killed_run_ends_as_if_it_had_not_been(text, trained, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "mlx_rgemma.train", "--data", str(text), *TINY]
    run = subprocess.Popen(
        [*command, "--save-path", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    checkpoint = folder / "checkpoint.safetensors"
    while not checkpoint.exists() and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    run.communicate()
    assert checkpoint.exists()
    assert main(["--data", str(text), "--save-path", str(folder), *TINY]) == 0
    one, other = (mx.load(str(f / "checkpoint.safetensors")) for f in (trained, folder))
    assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
    for name in ("model/model.safetensors", "tokenizer.model"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()
    logs = [
        [json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()]
        for f in (trained, folder)
    ]
    timed = {"iterations_per_second", "tokens_per_second", "peak_memory", "val_time"}
    kept = [[{k: v for k, v in x.items() if k not in timed} for x in log] for log in logs]
    assert kept[0] == kept[1]


def test_training_continues_from_a_model(text, trained, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        f"data: [{text}/a.txt=3, {text}/b.txt.xz=1]\n"
        f"init_from: {trained}/model\n"
        f"save_path: {tmp_path}/run\n"
        "iters: 3\nlearning_rate: 1e-3\ncontext_length: 24\nsave_dtype: float32\n"
        "sample_prompt: null\nwhole_files: false\nwarmup: 0\n"
    )
    assert main(["--config", str(tmp_path / "recipe.yaml"), "--iters", "2"]) == 0
    printed = capsys.readouterr().out
    assert "75.0% of the training tokens" in printed and "iters: 2" in printed
    assert "Learning Rate 5.000e-04" in printed  # the cosine's middle: the number was read as one
    before, after = (
        mx.load(str(f / "model/model.safetensors")) for f in (trained, tmp_path / "run")
    )
    moved = [float(mx.abs(before[k].astype(mx.float32) - after[k]).max().item()) for k in before]
    assert 0 < max(moved) < 0.01


def test_a_finished_run_can_be_asked_for_again(trained, text, capsys):
    before = (trained / "model/model.safetensors").read_bytes()
    assert main(["--data", str(text), "--save-path", str(trained), *TINY]) == 0
    assert "Resuming after iteration 6" in capsys.readouterr().out
    assert (trained / "model/model.safetensors").read_bytes() == before


def mistake(capsys, *arguments: str) -> str:
    """The one line that a mistake is told in."""
    assert main(list(arguments)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    return printed


def test_mistakes(text, trained, tmp_path, capsys):
    data, new = ["--data", str(text)], ["--save-path", str(tmp_path / "new")]
    (tmp_path / "empty.txt").write_text("\n\n \n")
    (tmp_path / "latin.txt").write_bytes("Münze".encode("latin-1"))
    (tmp_path / "bad.txt.xz").write_bytes(b"no xz")
    (tmp_path / "none").mkdir()
    for file, expected in (
        ("empty.txt", "empty.txt: holds no text."),
        ("latin.txt", "latin.txt: not UTF-8 text"),
        ("bad.txt.xz", "bad.txt.xz: not an xz file"),
        ("none", "none: holds no .txt or .txt.xz file."),
        ("missing.txt", "missing.txt: no such file or folder."),
    ):
        assert expected in mistake(capsys, "--data", str(tmp_path / file), *new)
    assert "name it with --data" in mistake(capsys, *new)
    assert "the weight is 0" in mistake(capsys, "--data", f"{text}=0", *new)
    assert "--vocab-size 90000: the text supports at most 2" in mistake(
        capsys, *data, *new, "--vocab-size", "90000"
    )
    assert "--vocab-size 8: each character of the text is a token; give at least" in mistake(
        capsys, *data, *new, "--vocab-size", "8"
    )
    long = ("--context-length", "90000")
    assert "fewer than one sequence" in mistake(capsys, *data, *new, *TINY, *long)
    assert "does not divide" in mistake(capsys, *data, *new, *TINY, "--num-attention-heads", "5")
    assert "no such folder" in mistake(capsys, *data, "--init-from", str(tmp_path / "x"), *new)
    assert "no such file" in mistake(
        capsys, *data, "--tokenizer", str(tmp_path / "x"), "--save-path", str(tmp_path / "new2")
    )
    assert not (tmp_path / "new").exists() and not (tmp_path / "new2").exists()
    if _has_matplotlib():
        for plot, expected in (("a.xyz", "not an image file"), ("no/a.png", "there is no folder")):
            there = ["--save-path", str(tmp_path / "plotted"), *TINY]
            assert expected in mistake(capsys, *data, *there, "--plot", str(tmp_path / plot))
        assert not (tmp_path / "plotted").exists()
    assert main([*data, *new, *TINY, "--vocab-size", "150", "--iters", "1"]) == 0
    config = json.loads((tmp_path / "new/model/config.json").read_text())
    assert config["vocab_size"] == 150
    # A folder whose run had other settings, or other text, is left alone.
    before = (trained / "checkpoint.safetensors").read_bytes()
    there = ["--save-path", str(trained), *TINY]
    assert "run with seed = 0, this one has 1" in mistake(capsys, *data, *there, "--seed", "1")
    assert "run with texts" in mistake(capsys, "--data", f"{text}/a.txt", *there)
    assert (trained / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("iters: many", "iters is 'many': invalid integer value"),
        ("iters: 0", "iters is 0: 0 is not at least 1"),
        ("itres: 5", "unknown setting itres; did you mean iters?"),
        ("shape: huge", "shape is 'huge', expected one of micro, tiny, small, 40m, 2b, 9b"),
        ("whole_files: 1", "whole_files is 1, expected true or false"),
        ("data: [[a]]", "data is [['a']], expected text, or a list of texts"),
        ("- 1", "expected lines of the form key: value"),
        ("a: [", "not a YAML file"),
        ("config: other.yaml", "a configuration file cannot name another one"),
    ],
)
def test_mistakes_in_a_recipe(recipe, expected, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    printed = mistake(capsys, "-c", str(file))
    assert expected in printed and "recipe.yaml: " in printed


def test_the_vocabulary_is_as_large_as_the_text_supports(text, tmp_path, capsys):
    options = [*TINY[2:], "--iters", "1", "--save-path", str(tmp_path / "run")]
    assert main(["--data", str(text), *options]) == 0
    printed = capsys.readouterr().out
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert 200 < config["vocab_size"] < 2048
    said = f"Vocabulary: {config['vocab_size']} tokens, the most that a text of this size supports"
    assert said in printed and "\n  Sample: " in printed


@pytest.mark.parametrize(
    "sizes",
    [
        ["--hidden-size", "16384", "--num-hidden-layers", "1000"],
        ["--batch-size", "16777216", "--context-length", "1000"],
        ["--attention-window-size", "16777216", "--num-hidden-layers", "1000"],
    ],
    ids=lambda sizes: sizes[0],
)
def test_what_memory_does_not_hold_is_refused(sizes, text, tmp_path, capsys):
    folder = ["--save-path", str(tmp_path / "run")]
    assert "do not fit into memory: at least" in mistake(
        capsys, "--data", str(text), *folder, *TINY, *sizes
    )
    assert not (tmp_path / "run").exists()


def test_an_exploding_run_says_so(text, tmp_path, capsys):
    printed = mistake(
        capsys,
        *("--data", str(text), "--save-path", str(tmp_path), *TINY, "--learning-rate", "1e18"),
        *("--warmup", "0", "--max-grad-norm", "0", "--iters", "40"),
    )
    assert "the loss became" in printed


def test_the_recipe_of_the_embedded_model():
    """It can be read, and makes a model of the embedded one's shape."""
    from mlx_rgemma import load_model
    from mlx_rgemma.train import read_config

    examples = Path(__file__).parents[2] / "examples" / "train"
    recipe, _, _ = read_config(["-c", str(examples / "embedded.yaml")])
    shape = recipe.model_config(vocab_size=2048).to_dict()
    embedded = load_model(None, lazy=True)[1].to_dict()
    assert shape == {k: v for k, v in embedded.items() if k not in ("dtype", "torch_dtype")}
    log = [json.loads(line) for line in (examples / "embedded.jsonl").read_text().splitlines()]
    assert log[-1]["iteration"] == recipe.iters == 1000
    assert log[-2]["trained_tokens"] == recipe.iters * recipe.batch_size * recipe.context_length
