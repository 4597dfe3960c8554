"""The cache_prompt command: a document is read once, from anywhere, and gone on from."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL
from test_chat import answers, chat, chat_model  # noqa: F401

from mlx_rgemma import Session, generate, load, load_prompt_cache, register
from mlx_rgemma.cpu.numba_runtime import COMPILING
from mlx_rgemma.io.text import DEFAULT_TEXT

COMMAND = [sys.executable, "-W", "error::RuntimeWarning", "-m", "mlx_rgemma.cache_prompt"]
STORY = DEFAULT_TEXT.read_text(encoding="utf-8")[:1500]


@pytest.fixture(scope="module")
def embedded():
    return load()


def run(*args: str, stdin: str | None = None) -> SimpleNamespace:
    result = subprocess.run(
        [*COMMAND, *args], input=stdin, capture_output=True, text=True, timeout=120
    )
    errors = result.stderr.replace(f"{COMPILING}\n", "")  # the first run of all
    return SimpleNamespace(code=result.returncode, out=result.stdout, err=errors)


@pytest.mark.parametrize("source", ["argument", "stdin", "file"])
def test_the_state_is_that_of_one_pass(embedded, source, tmp_path):
    model, tokenizer = embedded
    file, text = tmp_path / "state.safetensors", tmp_path / "story.txt"
    text.write_text(STORY, encoding="utf-8")
    options = {
        "argument": ["--prompt", STORY],
        "stdin": ["--prompt", "-"],
        "file": ["--prompt-file", str(text)],
    }[source]
    result = run("--prompt-cache-file", str(file), *options, stdin=STORY)
    assert (result.code, result.err) == (0, "")
    tokens = tokenizer.encode(STORY)
    assert result.out.startswith(f"Processed {len(tokens)} tokens (")
    assert "State: 0.111 MB" in result.out
    assert "Peak memory: " in result.out
    cache = load_prompt_cache(file, model)
    assert cache[0].offset == len(tokens)
    found = np.array(model(mx.array([[30]]), cache=cache))
    expected = np.array(model(mx.array([[*tokens, 30]])))[:, -1:]
    assert np.abs(found - expected).max() < LOGITS_ATOL


def test_mlx_lm_reads_the_file(embedded, tmp_path):
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import load_prompt_cache as mlx_lm_load

    model, tokenizer = embedded
    file = tmp_path / "state.safetensors"
    assert run("--prompt-cache-file", str(file), "--prompt", "Once upon").code == 0
    register()
    cache = mlx_lm_load(str(file))
    steps = generate_step(mx.array([30, 31]), model, prompt_cache=cache, max_tokens=8)
    found = [token for token, _ in steps]
    session = Session(model, tokenizer)
    session.feed("Once upon")
    assert found == [r.token for r in session.stream([30, 31], max_tokens=8)]


def test_chat_continues_from_it(embedded, tmp_path):
    model, tokenizer = embedded
    file = tmp_path / "state.safetensors"
    assert run("--prompt-cache-file", str(file), "--prompt", "Once upon a").code == 0
    expected = generate(model, tokenizer, "Once upon a time", max_tokens=10)
    result = chat("-m", "10", "--prompt-cache-file", str(file), lines=[" time"])
    again = Session(model, tokenizer)
    again.feed("Once upon a")
    assert answers(result.out) == [again.generate("time", max_tokens=10)]
    command = [sys.executable, "-m", "mlx_rgemma.generate", "--prompt", " time", "-m", "10"]
    written = subprocess.run(
        [*command, "--verbose", "f", "--prompt-cache-file", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert written.stdout == expected + "\n"


def test_in_a_chat_template_the_question_ends_the_turn(chat_model, tmp_path):  # noqa: F811
    """A document and a question are one message, as the template has it."""
    file = tmp_path / "state.safetensors"
    options = ["--model", str(chat_model), "--prompt-cache-file", str(file)]
    assert run(*options, "--prompt", "A long story.\n").code == 0
    result = chat(*options, "-m", "8", lines=["Who was it?"])
    model, tokenizer = load(chat_model)
    message = {"role": "user", "content": "A long story.\nWho was it?"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    session = Session(model, tokenizer)
    expected = session.generate(text, max_tokens=8)
    assert answers(result.out) == [expected.replace("\n", "")]
    assert f" {session.tokens_seen} in the state" in result.out
    command = [sys.executable, "-m", "mlx_rgemma.generate", *options, "-m", "8", "--verbose", "f"]
    written = subprocess.run(
        [*command, "--prompt", "Who was it?"], capture_output=True, text=True, timeout=120
    )
    assert written.stdout == expected + "\n"
    plain = run(*options, "--ignore-chat-template", "--prompt", "A long story.\n")
    length = len(tokenizer.encode("A long story.\n"))
    assert plain.out.startswith(f"Processed {length} tokens")


def test_mistakes_get_one_line(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà".encode("latin-1"))
    file = str(tmp_path / "state.safetensors")
    for args, message in (
        (["--prompt", "", "--prompt-cache-file", file], "the prompt is empty"),
        (["--prompt-file", "missing.txt", "--prompt-cache-file", file], "missing.txt"),
        (["--prompt-file", str(latin), "--prompt-cache-file", file], "latin.txt: not UTF-8"),
        (["--prompt", "a", "--prompt-cache-file", f"{tmp_path}/no/s"], "there is no folder"),
        (["--prompt", "a", "--prompt-cache-file", file, "--kv-bits", "4"], "bounded already"),
    ):
        result = run(*args)
        assert result.code == 1
        assert message in result.err
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latin.txt"]
    assert run("--prompt", "a").code == 2
