"""The chat command, and conversations in one state: nothing read twice, BOS once."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL

from mlx_rgemma import Session, generate, load
from mlx_rgemma.errors import UserError
from mlx_rgemma.io.hub import EMBEDDED
from mlx_rgemma.sessions.conversation import Conversation

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-W", "error::RuntimeWarning", "-m", "mlx_rgemma.chat"]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ 'model' if m.role == 'assistant' else m.role }}>\n{{ m.content | trim }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<model>\n{% endif %}"
)
"""Gemma's, with the embedded model's tokens."""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A folder with the embedded model and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(EMBEDDED, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def embedded():
    return load()


def chat(*args: str, lines: list[str], code: int = 0) -> SimpleNamespace:
    result = subprocess.run(
        [*COMMAND, *args], input="\n".join(lines), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return SimpleNamespace(out=result.stdout, err=result.stderr)


def answers(out: str) -> list[str]:
    """What stands before each line of statistics, without what commands print."""
    found, text = [], ""
    for line in out.splitlines()[2:]:
        if " tok/s · prompt " in line:
            found.append(text)
            text = ""
        elif not line.startswith(("[", "* ", "  ")):
            text += line
    return found


def state(session: Session) -> np.ndarray:
    """The state, as what it predicts."""
    return np.array(next(iter(session.fork().stream(max_tokens=1))).logprobs)


def test_the_history_is_kept_and_read_once(embedded):
    model, tokenizer = embedded
    result = chat("-m", "12", lines=["Once upon a time", "The dog", "r", "Once upon a time", "q"])
    first = generate(model, tokenizer, "Once upon a time", max_tokens=12)
    session = Session(model, tokenizer)
    session.generate("Once upon a time", max_tokens=12)
    second = session.generate("\nThe dog", max_tokens=12)
    assert answers(result.out) == [first, second, first]
    assert result.err == ""
    seen = [line.split(" in the state")[0].split()[-1] for line in result.out.splitlines()]
    seen = [int(s) for s in seen if s.isdigit()]
    assert seen == [5 + 12, session.tokens_seen, 5 + 12]
    assert "[reset]" in result.out


def test_help_empty_lines_and_the_end_of_the_input():
    result = chat("-m", "3", lines=["", "h", "A cat"])
    for command in ("q  ", "r  ", "h  ", "/save", "/load", "/fork", "/switch", "/forks"):
        assert f"\n  {command}" in result.out
    assert len(answers(result.out)) == 1


@pytest.mark.parametrize("word", ["q", "/q", "exit", "/exit", "/quit", "/bye"])
def test_words_that_quit(word, monkeypatch, capsys):
    from mlx_rgemma.chat import main

    lines = iter([word, "A cat"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["-m", "2"]) == 0
    assert " tok/s" not in capsys.readouterr().out
    assert next(lines) == "A cat"  # not read


def test_words_for_help(monkeypatch, capsys):
    from mlx_rgemma.chat import HELP, main

    lines = iter(["h", "/h", "/help", "/?", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["-m", "2"]) == 0
    captured = capsys.readouterr()
    assert (captured.out.count(HELP), captured.err) == (4, "")


def test_line_editing_is_loaded_and_can_be_absent(monkeypatch, capsys):
    from mlx_rgemma.chat import main

    monkeypatch.setattr("builtins.input", lambda prompt: "q")
    monkeypatch.delitem(sys.modules, "readline", raising=False)
    assert main([]) == 0
    assert "readline" in sys.modules
    monkeypatch.setitem(sys.modules, "readline", None)
    assert main([]) == 0
    assert capsys.readouterr().err == ""


def test_save_load_and_fork(embedded, tmp_path):
    file = tmp_path / "my chat.safetensors"
    lines = [
        "Once upon a time",
        f"/save {file}",
        "/fork other",
        "The dog",
        "/switch main",
        "The dog",
        "r",
        f"/load {file}",
        "The dog",
        "/forks",
    ]
    result = chat("-m", "10", lines=lines)
    others = answers(result.out)[1:]
    assert len(others) == 3
    assert len(set(others)) == 1
    assert result.err == ""
    assert f"[saved in {file}: 15 tokens]" in result.out
    assert "* main: " in result.out.split("[loaded")[1]
    model, tokenizer = embedded
    saved = Session.load(file, model, tokenizer)
    assert saved.generate("\nThe dog", max_tokens=10) == others[0]
    again = chat("-m", "10", "--prompt-cache-file", str(file), lines=["The dog"])
    assert answers(again.out) == others[:1]


def test_states_under_any_name(embedded, tmp_path):
    """The messages name the real file: at the end of a link, with the suffix of mlx-lm's."""
    names = ["book", "a.b", "x.npz", "dir/über", "two words"]
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("dir/real")
    model, tokenizer = embedded
    Session(model, tokenizer).save(tmp_path / "other.safetensors")
    lines = ["Once upon a time"]
    for name in [*names, "link"]:
        lines += [f"/save {tmp_path / name}", "r", f"/load {tmp_path / name}"]
    result = chat("-m", "3", lines=[*lines, f"/load {tmp_path / 'other'}"])
    assert result.err == ""
    for name in [*names, "dir/real"]:
        assert f"[saved in {tmp_path / name}: 8 tokens]" in result.out
        assert f"[loaded {tmp_path / name}: 8 tokens]" in result.out
    assert f"[loaded {tmp_path / 'other.safetensors'}: 0 tokens]" in result.out
    assert (tmp_path / "link").is_symlink()


def test_mistakes_are_one_line_and_the_conversation_continues(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no state")
    lines = [
        "/save",
        "/load",
        "/forks now",
        "/load missing.safetensors",
        f"/load {tmp_path / 'broken.safetensors'}",
        f"/save {tmp_path / 'no' / 'folder.safetensors'}",
        "/switch nowhere",
        "/fork main",
        "/nonsense",
        "A cat",
    ]
    result = chat("-m", "3", lines=lines)
    errors = result.err.splitlines()
    assert len(errors) == 9
    for error, message in zip(
        errors,
        [
            "takes one name",
            "takes one name",
            "takes no name",
            "no such file",
            "broken",
            "folder",
            "there is no copy nowhere",
            "main exists already",
            "/nonsense is not a command",
        ],
        strict=True,
    ):
        assert error.startswith("error: ")
        assert message in error
    assert len(answers(result.out)) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kv-bits", "4"], "bounded already, 0.1 MB at any length"),
        (["--max-kv-size", "99"], "bounded already"),
        (["--prompt-cache-file", "missing.safetensors"], "missing.safetensors"),
        (["--system-prompt", "Be brief"], "a system prompt needs a chat template"),
        (["--model", "no/such/folder/here"], "no/such/folder/here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_get_one_line(args, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = chat(*args, lines=["A cat"], code=1)
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_sampling_options_are_heard():
    def first(*args: str) -> str:
        return answers(chat("-m", "40", *args, lines=["The"]).out)[0]

    plain = first()
    assert first("--temp", "1.5", "--seed", "1") == first("--temp", "1.5", "--seed", "1") != plain
    assert first("--temp", "1.5", "--top-k", "1") == plain
    assert first("--repetition-penalty", "5") != plain
    assert first("--stop", plain[4:7]) == plain[:4].rstrip("\n")


def test_ctrl_c_stops_an_answer_and_not_the_program():
    process = subprocess.Popen(
        [*COMMAND, "-m", "-1", "--temp", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("Once upon a time\n")
    process.stdin.flush()
    process.stdout.readline(), process.stdout.readline()
    process.stdout.read(20)  # an answer that would never end
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    while process.stdout.readline() != "[stopped]\n":
        pass
    assert " tokens · " in process.stdout.readline()
    out, errors = process.communicate("/forks\nq\n", timeout=60)
    assert out.startswith("* main: ")
    assert (process.returncode, errors) == (0, "")


def plain_pass(model, tokenizer, text: str) -> np.ndarray:
    session = Session(model, tokenizer)
    session.feed(text)
    return state(session)


@pytest.mark.parametrize("left", ["ended", "cut"])
def test_turns_add_up_to_what_the_template_makes_of_them_all(chat_model, left):
    """Turn by turn, the state is that of the whole conversation rendered at once."""
    model, tokenizer = load(chat_model)
    session = Session(model, tokenizer)
    conversation = Conversation(session)
    messages = []
    for question in ("A cat?", "  Why so\n\nmany?  ", "<user>"):
        messages.append({"role": "user", "content": question})
        for _ in conversation.ask(question, max_tokens=1):
            break
        # The model's answer is replaced by one that is known.
        session.rewind(before(model, tokenizer, messages))
        session.feed("Because of it.")
        if left == "ended":
            session.feed([tokenizer.eos_token_id])
        messages.append({"role": "assistant", "content": "Because of it."})
    text = conversation.turn("And now?")
    session.feed(text)
    messages.append({"role": "user", "content": "And now?"})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == rendered[rendered.rindex("Because of it.") + 14 :].removeprefix(
        "</s>" if left == "ended" else ""
    )
    assert np.abs(state(session) - plain_pass(model, tokenizer, rendered)).max() < LOGITS_ATOL
    assert session.tokens_seen == len(tokenizer.encode(rendered, add_special_tokens=False))


def before(model, tokenizer, messages):
    """A mark where all messages have been read and the answer begins."""
    session = Session(model, tokenizer)
    session.feed(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    return session.mark()


def test_a_turn_follows_what_the_model_really_wrote(chat_model):
    """Two questions: the state is one pass over the template with the real answer's tokens."""
    model, tokenizer = load(chat_model)
    session = Session(model, tokenizer)
    conversation = Conversation(session)
    tokens = tokenizer.encode(conversation.turn("A cat?"), add_special_tokens=False)
    tokens = list(tokens) + [r.token for r in conversation.ask("A cat?", max_tokens=7)]
    second = conversation.turn("And?")
    assert second.startswith("</s>\n<user>\nAnd?")
    bos = tokenizer.bos_token_id
    assert tokens.count(bos) == 1
    list(conversation.ask("And?", max_tokens=1))
    whole = Session(model, tokenizer)
    whole.feed(tokens)
    whole.feed(second)
    whole.generate(max_tokens=1)
    assert np.abs(state(session) - state(whole)).max() < LOGITS_ATOL
    assert session.tokens_seen == whole.tokens_seen


def test_a_message_whose_answer_has_not_begun_is_taken_back(chat_model):
    model, tokenizer = load(chat_model)
    session = Session(model, tokenizer, prefill_step_size=4)
    conversation = Conversation(session)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("A cat and a dog and a bird", progress=interrupt))
    assert session.tokens_seen == 0


def test_templates_and_their_refusals(chat_model, embedded):
    model, tokenizer = load(chat_model)
    conversation = Conversation(Session(model, tokenizer), system_prompt="Be brief")
    with pytest.raises(UserError, match="refuses the message: System role not supported"):
        conversation.turn("A cat?")
    begun = Session(model, tokenizer)
    begun.feed("A cat")
    with pytest.raises(UserError, match="at the beginning"):
        Conversation(begun, system_prompt="Be brief")
    plain = Conversation(Session(*embedded))
    assert plain.turn("A cat?") == "A cat?"
    off = Conversation(Session(model, tokenizer), use_template=False)
    assert off.turn("A cat?") == "A cat?"


def test_the_command_with_a_chat_template(chat_model):
    result = chat("--model", str(chat_model), "-m", "6", lines=["A cat?", "Why?"])
    model, tokenizer = load(chat_model)
    conversation = Conversation(Session(model, tokenizer))
    expected = [
        "".join(r.text for r in conversation.ask(message, max_tokens=6)).replace("\n", "")
        for message in ("A cat?", "Why?")
    ]
    assert answers(result.out) == expected
    system = chat("--model", str(chat_model), "--system-prompt", "Be brief", lines=["A cat?"])
    assert "System role not supported" in system.err
