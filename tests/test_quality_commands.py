"""The commands perplexity and quantize, and convert --report: what they print, how they fail."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.models import GOLDEN

from mlx_rgemma import convert, load, load_model
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.save import save_model
from mlx_rgemma.checkpoints.schema import check_contents
from mlx_rgemma.convert import main as convert_main
from mlx_rgemma.io.hub import EMBEDDED
from mlx_rgemma.io.text import DEFAULT_TEXT, read_documents
from mlx_rgemma.perplexity import main as perplexity_main
from mlx_rgemma.quantize import ALL_SETTINGS
from mlx_rgemma.quantize import main as quantize_main

TEXT = "The cat sat on the mat. The dog ran to the park."


def test_perplexity_of_the_embedded_model(capsys):
    assert perplexity_main(["--num-samples", "1", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["model"] == "embedded" and entry["bits_per_weight"] == 16.0
    assert 5 < entry["perplexity"] < 100 and entry["mean_kl"] is None
    assert entry["bytes_per_token"] == 6207360 + entry["state_bytes"]


def test_perplexity_beside_a_reference(tmp_path, capsys):
    convert(EMBEDDED, tmp_path / "q4", quantize=True, q_bits=4)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["--model", str(tmp_path / "q4"), "--reference", str(EMBEDDED)]
    assert perplexity_main([*command, "--data-path", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "mean KL" in printed.splitlines()[0] and printed.splitlines()[2].startswith("| q4 ")
    tokens = len(load()[1].encode(TEXT))  # and end-of-text, but the first is not predicted
    assert f"{tokens} tokens in 1 sequence," in printed and "peak memory" in printed


def test_the_text_may_come_from_anywhere(tmp_path, monkeypatch, capsys):
    file, lines = tmp_path / "text.txt", tmp_path / "text.jsonl"
    file.write_text(TEXT)
    lines.write_text(f"\n{json.dumps({'text': TEXT})}\n\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    found = []
    for path in (file, lines, "-"):
        assert perplexity_main(["--data-path", str(path), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]


class ChatTokenizer:
    """A tokenizer whose template one can see."""

    has_chat_template, bos_token = True, "<bos>"

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        if messages[0]["role"] == "system":
            raise ValueError("no system")
        return "<bos>" + "".join(f"<{m['role']}>{m['content']}" for m in messages)


def test_json_lines(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"text": "one"}\n{"prompt": "two ", "completion": "three"}\n'
        '{"messages": [{"role": "user", "content": "four"}]}\n'
    )
    assert read_documents(file, ChatTokenizer()) == ["one", "two three", "<user>four"]


BAD_TEXTS = {
    "missing": (None, "no such file; give a file of text"),
    "empty": (b" \n", "holds no text"),
    "not UTF-8": (b"\xff\xfe", "not UTF-8 text"),
    "not JSON": (b'{"text": "a"}\nb', "line 2 is not JSON"),
    "no text": (b'{"txt": "a"}', "line 1 has neither 'text' nor"),
    "a list": (b'["a"]', "line 1 is not a JSON object"),
    "no template": (b'{"messages": []}', "line 1 has messages, but the model has no chat template"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_texts(tmp_path, capsys, content, message):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert perplexity_main(["--data-path", str(file)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert str(file) in captured.err and message in captured.err


def test_a_template_that_refuses(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"messages": [{"role": "system", "content": "x"}]}')
    with pytest.raises(ValueError, match="line 1: the model's chat template refuses it: no system"):
        read_documents(file, ChatTokenizer())


def test_a_folder_is_no_text(tmp_path, capsys):
    assert perplexity_main(["--data-path", str(tmp_path)]) == 1
    assert "a folder; give a file of text" in capsys.readouterr().err


def test_convert_report(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    command = ["--model", str(EMBEDDED), "--mlx-path", str(out), "-q", "--report", str(text)]
    assert convert_main(command) == 0
    printed = capsys.readouterr().out
    assert "| embedded " in printed and "| out " in printed
    source, made = json.loads((out / "quality.json").read_text())
    assert source["mean_kl"] < 1e-9 < 1e-3 < made["mean_kl"] < 1
    assert made["file_bytes"] < source["file_bytes"] / 2
    card = (out / "README.md").read_text()
    assert "## Quality" in card and f"{made['mean_kl']:.5f}" in card
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "out"}
    load(out)


def test_report_on_an_archive(tmp_path, capsys):
    """No model can be loaded from one: it is converted for the time of the report."""
    text, out, archive = tmp_path / "text.txt", tmp_path / "out", tmp_path / "story.tar.gz"
    text.write_text(TEXT)
    with tarfile.open(archive, "w:gz", compresslevel=1) as file:
        file.add(EMBEDDED, "embedded")
    command = ["--model", str(archive), "--mlx-path", str(out), "-q", "--report", str(text)]
    assert convert_main(command) == 0
    source, made = json.loads((out / "quality.json").read_text())
    assert (source["model"], source["bits_per_weight"]) == ("story.tar.gz", 16.0)
    assert source["mean_kl"] < 1e-9 < 1e-3 < made["mean_kl"] < 1
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "out", "story.tar.gz"}


def test_report_without_a_text_reads_the_stories_of_the_package():
    from mlx_rgemma.convert import STORIES, build_parser

    assert build_parser().parse_args(["--model", "x", "--report"]).report == STORIES
    stories = read_documents()
    assert len(stories) == 8 and "\n\n".join(stories) == DEFAULT_TEXT.read_text().strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", str(GOLDEN / "tiny-2b"), "--report"], "no tokenizer; --report needs one"),
        (["--model", str(EMBEDDED), "--report", "absent.txt"], "absent.txt: no such file"),
    ],
    ids=["no tokenizer", "no text"],
)
def test_a_report_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path, capsys, arguments, message
):
    assert convert_main([*arguments, "--mlx-path", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_compare(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    settings = ["--setting=-q --q-bits 4", "--setting", "-q --q-group-size 128"]
    command = ["compare", "--data-path", str(text), *settings]
    assert quantize_main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| -q --q-bits 4 |")
    assert lines[-1].startswith("Left out: -q --q-group-size 128: q-group-size is 128, which")
    assert quantize_main([*command[:-2], "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["model"] == "-q --q-bits 4" and entry["mean_kl"] > 0.001


def test_compare_knows_every_setting():
    """All modes, bits, group sizes and recipes that convert offers are among its defaults."""
    from mlx_rgemma.checkpoints.quantization import MODES, RECIPES
    from mlx_rgemma.quantize import _options

    tried = [_options(flags) for flags in ALL_SETTINGS]
    groups, bits = MODES["affine"]
    assert {(t["q_bits"], t["q_group_size"]) for t in tried} >= {
        (b, g) for b in bits for g in groups
    }
    assert {t["q_mode"] for t in tried} == set(MODES)
    assert {t["quant_predicate"] for t in tried} == {None, *RECIPES} - {"rgemma"}
    assert "-q" in ALL_SETTINGS  # which is rgemma


@pytest.mark.parametrize("flags", ["-q --q-bits x", "-q --bits 4", "-q 'a"], ids=str)
def test_compare_refuses_other_flags(capsys, flags):
    assert quantize_main(["compare", f"--setting={flags}"]) == 1
    assert flags in capsys.readouterr().err


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    """A model of two layers, so small that it learns in seconds, and a text."""
    from mlx.utils import tree_map

    from mlx_rgemma import GriffinConfig, Model

    root = tmp_path_factory.mktemp("learn")
    values = json.loads((EMBEDDED / "config.json").read_text())
    sizes = {"hidden_size": 64, "lru_width": 64, "intermediate_size": 128, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_hidden_layers": 3}
    mx.random.seed(0)
    model = Model(GriffinConfig.from_dict({**values, **sizes, **heads}))
    noise = tree_map(lambda v: 0.2 * mx.random.normal(v.shape), model.parameters())
    model.update(noise)
    save_model(root / "model", model, source=EMBEDDED, dtype=mx.float32)
    (root / "text.txt").write_text("\n".join(read_documents()))
    return root


LEARNED = {
    "gptq": ["--sequence-length", "64", "--num-samples", "4"],
    "dynamic_quant": ["--target-bpw", "5.5"],
    "dwq": [
        "--max-seq-length",
        "65",
        "--batch-size",
        "2",
        "--num-samples",
        "8",
        "--learning-rate",
        "1e-4",
    ],
}


@pytest.mark.parametrize(("name", "options"), LEARNED.items(), ids=LEARNED)
def test_learned_quantizations(learner, name, options):
    """mlx-lm's quantizers with this package's class, on a local text, without a network."""
    target = learner / name
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlx_rgemma.quantize", name),
            *("--model", str(learner / "model"), "--mlx-path", str(target)),
            *("--data-path", str(learner / "text.txt"), *options),
        ],
        capture_output=True,
        text=True,
        cwd=learner,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(learner)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    quantized = check_contents(CheckpointFolder.open(target)).quantized
    bits = {how.bits for how in quantized.values()}
    assert bits == {"gptq": {4, 6}, "dynamic_quant": {4, 5}, "dwq": {4}}[name]
    model, _ = load_model(target)
    assert mx.isfinite(model(mx.array([[2, 5, 9]]))).all().item()
    # What was learned is not what plain rounding gives.
    plain, _ = load_model(learner / "model")
    path = "model.layers.0.mlp_block.down_proj"
    matrix = plain.layers[0].mlp_block.down_proj.weight
    weight, scales, _ = mx.quantize(matrix, group_size=64, bits=quantized[path].bits)
    learned = model.layers[0].mlp_block.down_proj
    same_scales = mx.allclose(learned.scales, scales, rtol=1e-4, atol=0).item()
    same_weight = mx.array_equal(learned.weight, weight).item()
    assert same_scales == (name != "dwq") and same_weight == (name != "gptq")


def test_learning_fails_in_one_line(learner, capsys):
    common = ["--model", str(learner / "model"), "--mlx-path"]
    assert quantize_main(["dwq", *common, str(learner)]) == 1
    assert "exists already" in capsys.readouterr().err
    new = str(learner / "new")
    assert quantize_main(["gptq", *common, new, "--data-path", "absent"]) == 1
    assert "absent: no such file" in capsys.readouterr().err
    short = learner / "short.txt"
    short.write_text("A cat.")
    assert quantize_main(["dwq", *common, new, "--data-path", str(short)]) == 1
    assert "too short: it has 1 samples, and 8 are needed" in capsys.readouterr().err
    text = ["--data-path", str(learner / "text.txt")]
    assert quantize_main(["gptq", *common, new, *text, "--bits", "3"]) == 1
    assert capsys.readouterr().err.endswith("mlx-lm's gptq stopped: Unsupported bits 3\n")
    assert not Path(new).exists()


@pytest.mark.parametrize("main", [perplexity_main, quantize_main], ids=["perplexity", "quantize"])
def test_wrong_usage(capsys, main):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--no-such-flag"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unrecognized arguments: " in error
