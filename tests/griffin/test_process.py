"""A child that is forked after MLX was used is told so, where it would wait for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, signal, sys
import mlx.core as mx
import mlx_rgemma
from mlx_rgemma import Session, batch_generate, generate, load
from mlx_rgemma.errors import UserError
from mlx_rgemma.sessions.prompt_cache import load_prompt_cache, save_prompt_cache

def in_child(work):
    "What becomes of it in a forked child that has ten seconds: its error, 'done' or 'hangs'."
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            work()
            text = "done"
        except UserError as error:
            text = str(error)
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return "hangs" if os.WIFSIGNALED(status) else file.read()

def first_use():
    model, tokenizer = load()
    generate(model, tokenizer, "Once", max_tokens=2)

found = {"first use": in_child(first_use)}
model, tokenizer = load()
session = Session(model, tokenizer)
session.feed("Once upon a time")
saved = sys.argv[1]
session.save(saved)
cache = model.make_cache()
generate(model, tokenizer, "Once", max_tokens=2)
found |= {
    name: in_child(work)
    for name, work in {
        "generate": lambda: generate(model, tokenizer, "Once", max_tokens=2),
        "batch_generate": lambda: batch_generate(model, tokenizer, ["Once"], max_tokens=2),
        "new session": lambda: Session(model, tokenizer),
        "feed": lambda: session.feed("there was"),
        "go on": lambda: session.generate(max_tokens=2),
        "call": lambda: mx.eval(model(mx.array([[3]]), cache=cache)),
        "last_logits": lambda: mx.eval(model.last_logits(mx.array([[3]]), cache)),
        "fork a session": lambda: session.fork(),
        "save a session": lambda: session.save(saved),
        "load a session": lambda: Session.load(saved, model, tokenizer),
        "load a state": lambda: load_prompt_cache(saved, model),
        "save a state": lambda: save_prompt_cache(saved, model, cache),
        "another model": first_use,
    }.items()
}
session.feed("there was")  # the parent process continues
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_refused(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "saved.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("first use") == "done"  # nothing was used before it was forked
    assert len(found) == 13
    for name, text in found.items():
        assert "forked after MLX was used" in text and "spawn" in text, (name, text)
        assert "\n" not in text


def test_a_spawned_child_may_use_what_it_is_given():
    """A model that was pickled belongs to whoever unpickles it."""
    code = (
        "import pickle, sys; import mlx.core as mx\n"
        "model = pickle.load(sys.stdin.buffer)\n"
        "print(model(mx.array([[3, 4]])).shape)"
    )
    import pickle

    from helpers.random_models import random_model

    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(random_model()),
        capture_output=True,
        timeout=120,
    )
    assert done.stdout.decode().strip() == "(1, 2, 96)", done.stderr.decode()
