"""The command: its flags, its output, and one clear line for every mistake."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from helpers.models import GOLDEN, golden_model

from mlx_rgemma import generate, load, save_prompt_cache
from mlx_rgemma.io.hub import EMBEDDED

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-W", "error::RuntimeWarning", "-m", "mlx_rgemma.generate"]
INTRODUCTION = (
    "Embedded demo model (3,103,680 parameters)."
    " For real answers: --model google/recurrentgemma-2b-it\n"
)


def run(*args: str, stdin: str | None = None, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *args], input=stdin, capture_output=True, text=True, timeout=300, **options
    )


def output(*args: str, stdin: str | None = None) -> str:
    result = run(*args, stdin=stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def expected():
    """What the function gives for the command's defaults."""
    model, tokenizer = load()
    return generate(model, tokenizer, "Once upon a time", max_tokens=100)


def test_output_has_mlx_lms_format(expected):
    result = run()
    assert (result.returncode, result.stderr) == (0, INTRODUCTION)
    lines = result.stdout.split("==========\n")
    assert lines[0] == ""
    assert lines[1] == expected + "\n"
    statistics = lines[2].splitlines()
    for line, start in zip(
        statistics, ("Prompt: ", "Generation: ", "Peak memory: ", "State: 0.111 MB"), strict=True
    ):
        assert line.startswith(start), line
    assert statistics[0].endswith("tokens-per-sec")


def test_first_token_needs_neither_mlx_lm_nor_transformers():
    """They take a second to import, longer than all the rest."""
    code = (
        "import sys; from mlx_rgemma.generate import main; main(['--max-tokens', '3'])\n"
        "print({'mlx_lm', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("set()\n"), result


def test_text_only(expected):
    result = run("--verbose", "False")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == expected + "\n"


def test_only_the_embedded_model_is_introduced(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    result = run("--model", str(tmp_path / "model"), "-m", "1")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("source", ["argument", "stdin", "file"])
def test_prompt_from_anywhere(source, tmp_path):
    prompt = "The old king had\ntwo sons. "
    options = ["--max-tokens", "8", "--verbose", "f"]
    if source == "argument":
        text = output("--prompt", prompt.replace("\n", "\\n"), *options)
    elif source == "stdin":
        text = output("-p", "-", *options, stdin=prompt)
    else:
        (tmp_path / "prompt.txt").write_text(prompt)
        text = output("--prompt-file", str(tmp_path / "prompt.txt"), *options)
    model, tokenizer = load()
    assert text == generate(model, tokenizer, prompt, max_tokens=8) + "\n"


def test_json():
    result = run("--json", "--prompt", "A cat", "-m", "5")
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert all(answer[f"{part}_tps"] > 0 for part in ("prompt", "generation"))
    assert set(answer) == {
        "text",
        "finish_reason",
        "prompt_tokens",
        "prompt_tps",
        "generation_tokens",
        "generation_tps",
        "peak_memory_gb",
        "state_bytes",
    }
    assert answer["generation_tokens"] == 5
    assert answer["finish_reason"] == "length"
    assert answer["state_bytes"] == 111_360


def test_several_prompts_at_once():
    prompts = ["A cat", "The king and the queen"]
    lines = output("--json", "-p", prompts[0], "-p", prompts[1], "-m", "6").splitlines()
    model, tokenizer = load()
    for line, prompt in zip(lines, prompts, strict=True):
        answer = json.loads(line)
        assert answer["text"] == generate(model, tokenizer, prompt, max_tokens=6)
        for figure in ("prompt_tps", "generation_tps", "peak_memory_gb"):  # of the whole batch
            assert answer[figure] > 0 and answer[figure] == json.loads(lines[0])[figure]
    shown = output("-p", prompts[0], "-p", prompts[1], "-m", "6")
    assert "========== 'A cat'\n" in shown
    assert "State: 2 x 0.111 MB" in shown


def test_sampling_options_are_heard():
    options = ["--json", "--prompt", "The", "-m", "40"]

    def text(*more: str) -> str:
        return json.loads(output(*options, *more))["text"]

    plain = text()
    assert text("--temp", "1.5", "--seed", "1") == text("--temp", "1.5", "--seed", "1") != plain
    assert text("--temp", "1.5", "--top-k", "1") == plain
    narrow = text("--temp", "1.5", "--seed", "1", "--top-p", "0.1")
    assert narrow != text("--temp", "1.5", "--seed", "1")
    assert text("--temp", "1.5", "--min-p", "1") == plain
    calm = ["--temp", "0.5", "--seed", "1"]
    exclude = [*calm, "--xtc-probability", "1"]
    assert text(*calm, "--top-k", "5000") == text(*calm) != text(*exclude)
    assert text(*exclude) != text(*exclude, "--xtc-threshold", "0.3")
    assert text("--repetition-penalty", "5") != plain
    assert text("--stop", plain[4:7]) == plain[:4]


def test_chat_template(tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(EMBEDDED, folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}<model>"
    )
    config_file.write_text(json.dumps(config))
    options = ["--model", str(folder), "--prompt", "A cat", "-m", "6", "--json"]
    model, tokenizer = load()
    plain = generate(model, tokenizer, "A cat", max_tokens=6)
    chat = generate(model, tokenizer, "<bos><user>A cat<model>", max_tokens=6)
    bos = tokenizer.bos_token
    chat = generate(model, tokenizer, f"{bos}<user>A cat<model>", max_tokens=6)
    assert json.loads(output(*options))["text"] == chat
    assert json.loads(output(*options, "--ignore-chat-template"))["text"] == plain
    result = run(*options, "--system-prompt", "Be brief")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "System role not supported" in result.stderr


def test_prompt_cache_file(tmp_path):
    model, tokenizer = load()
    text, rest = "Once upon a time", " there was"
    tokens = tokenizer.encode(text + rest)
    cache = model.make_cache()
    model(mx.array([tokenizer.encode(text)]), cache=cache)
    file = tmp_path / "state.safetensors"
    save_prompt_cache(file, model, cache)
    options = ["--prompt-cache-file", str(file), "--json", "-m", "8"]
    found = json.loads(output("--prompt", rest, *options))["text"]
    assert found == generate(model, tokenizer, tokens, max_tokens=8)

    other = golden_model("tiny-2b")
    cache = other.make_cache()
    save_prompt_cache(file, other, cache)
    result = run("--prompt", rest, *options)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {file}: ")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_is_clean():
    process = subprocess.Popen(
        [*COMMAND, "--max-tokens", "-1", "--temp", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "==========\n"
    process.stdout.read(20)  # text is coming
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == INTRODUCTION + "\n"
    assert "Generation: " in rest


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [*COMMAND, "--max-tokens", "200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=120)
    assert errors == INTRODUCTION


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "no/such/folder/here"], "no/such/folder/here"),
        (["--prompt-file", "missing.txt"], "missing.txt: No such file"),
        (["-p", "-", "-p", "-"], "stdin can be read once"),
        (["--adapter-path", "no-adapters"], "no-adapters"),
        (["--prompt-cache-file", "no-cache.safetensors"], "no-cache.safetensors"),
        (["--kv-bits", "4"], "bounded already, 0.1 MB at any length"),
        (["--max-kv-size", "100"], "bounded already, 0.1 MB at any length"),
        (["-p", "a", "-p", "b", "-m", "-1"], "--max-tokens -1 goes with one prompt"),
        (["-p", "a", "-p", "b", "--prompt-cache-file", "x"], "goes with one prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(args, message, tmp_path):
    result = run(*args, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-tokens", "0"], "0 is not at least 1"),
        (["--max-tokens", "-5"], "-5 is not at least 1"),
        (["--max-tokens", "many"], "invalid integer value: 'many'"),
        (["--temp", "-1"], "-1.0 is not between 0 and 1000"),
        (["--seed", "99999999999999999999"], "99999999999999999999 is not at most"),
        (["Hello there"], "did you mean --prompt 'Hello there'?"),
        (["--top-p", "1.5"], "1.5 is not between 0 and 1"),
        (["--top-k", "-2"], "-2 is not at least 0"),
        (["--prefill-step-size", "0"], "0 is not at least 1"),
        (["--dtype", "int4"], "invalid choice"),
        (["--window", "wide"], "invalid choice"),
        (["--temp", "nan"], "nan is not"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_values_are_refused_by_the_parser(args, message):
    result = run(*args)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_model_is_needed_for_help():
    start = time.perf_counter()
    assert "--prompt" in output("--help")
    assert time.perf_counter() - start < 10  # imports nothing: see test_architecture


def test_a_folder_of_another_precision(tmp_path):
    options = ["--model", str(GOLDEN / "tiny-2b")]
    result = run(*options)
    assert result.returncode == 1
    assert "tokenizer" in result.stderr


def test_the_command_does_without_pytorch(tmp_path):
    """transformers would import it, which takes longer than everything else together."""
    package, distribution = tmp_path / "torch", tmp_path / "torch-2.13.0.dist-info"
    package.mkdir()
    distribution.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('PyTorch was imported')\n")
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run("--max-tokens", "3", env=environment)
    assert (result.returncode, result.stderr) == (0, INTRODUCTION)


@pytest.mark.parametrize("name", ["generate", "chat", "cache_prompt", "server.command"])
def test_commands_that_generate_do_without_pytorch(name, monkeypatch):
    """Unless another program calls them."""
    command, asked = importlib.import_module(f"mlx_rgemma.{name}"), []

    def run(_, *, pytorch=True):
        asked.append(pytorch)
        return 0

    monkeypatch.setattr(command.cli, "run", run)
    needed = {"cache_prompt": ["--prompt", "x", "--prompt-cache-file", "y"]}.get(name, [])
    monkeypatch.setattr(sys, "argv", [name, *needed])
    assert command.main() == command.main(needed) == 0
    assert asked == [False, True]


def test_within_another_program_pytorch_stays(capsys):
    from mlx_rgemma.generate import main

    assert main(["--max-tokens", "1"]) == 0
    assert "Prompt: " in capsys.readouterr().out
    assert sys.modules.get("torch", "absent") is not None
