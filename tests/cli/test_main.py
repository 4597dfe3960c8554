"""The umbrella command, and what the parsers of all commands share."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlx_rgemma
from mlx_rgemma import __main__, cli

ROOT = Path(__file__).parents[2]
UMBRELLA = [sys.executable, "-m", "mlx_rgemma"]
COMMANDS = list(__main__.COMMANDS)


def parser_of(command: str):
    name = "server.command" if command == "server" else command
    return importlib.import_module(f"mlx_rgemma.{name}").build_parser()


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*UMBRELLA, *args], capture_output=True, text=True, timeout=300, **options
    )


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]], ids=" ".join)
def test_alone_it_lists_all_commands(args, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mlx-rgemma", *args])
    assert __main__.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 25
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(listed) == {name.split(".")[1] for name in scripts if "." in name}


@pytest.mark.parametrize("args", [["--version"], ["generate", "--version"], []], ids=str)
def test_the_version_and_the_menu_import_no_mlx(args):
    code = (
        "import sys; from mlx_rgemma.__main__ import main\n"
        f"try: main({args})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print({'mlx', 'mlx.core', 'mlx_lm', 'numpy', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert lines[-1] == "set()"
    if args:
        assert lines[:-1] == [f"mlx-rgemma {mlx_rgemma.__version__}"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_version_and_examples_that_it_takes(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"mlx-rgemma {command}"])
    parser = parser_of(command)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mlx-rgemma {mlx_rgemma.__version__}\n"
    lines = parser.format_help().splitlines()
    examples = lines[lines.index("examples:") + 1 :]
    assert 2 <= len(examples) <= 3
    for example in examples:
        start = f"  mlx-rgemma {command} "
        assert example.startswith(start)
        arguments = shlex.split(example.removeprefix(start))
        redirected = [i for i, word in enumerate(arguments) if word in "<>"]
        parser.parse_args(arguments[: redirected[0]] if redirected else arguments)


def test_help_shows_the_name_it_was_called_by(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/mlx_rgemma.generate", "--help"])
    assert parser_of("generate").format_usage().startswith("usage: mlx_rgemma.generate ")
    monkeypatch.setattr(sys, "argv", ["mlx-rgemma generate", "--help"])
    assert parser_of("generate").format_usage().startswith("usage: mlx-rgemma generate ")


def test_help_of_generate_is_in_groups():
    lines = parser_of("generate").format_help().splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    groups = ["options:", "model:", "prompt:", "sampling:", "speed:", "output:", "examples:"]
    assert titles == groups
    sampling = "\n".join(lines[lines.index("sampling:") : lines.index("speed:")])
    for flag in ("--temp", "--xtc-probability", "--xtc-threshold", "--seed", "--max-tokens"):
        assert flag in sampling
    assert "kv-size" not in "\n".join(lines)


def test_a_sub_command_is_the_dotted_command():
    arguments = ["--prompt", "A cat", "-m", "5", "--verbose", "f"]
    result = run("generate", *arguments)
    dotted = subprocess.run(
        [sys.executable, "-m", "mlx_rgemma.generate", *arguments], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == dotted.stdout


@pytest.mark.parametrize("name", ["cache_prompt", "cache-prompt"])
def test_words_of_a_name_are_joined_either_way(name, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([name, "--help"])
    assert stop.value.code == 0
    assert "--prompt-cache-file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("genrate", "unknown command 'genrate'; did you mean generate?"),
        ("serve", "unknown command 'serve'; did you mean server?"),
        ("cache-promt", "did you mean cache_prompt?"),
        ("xyz", "unknown command 'xyz'; one of generate, chat, "),
        ("--model", "unknown command '--model'"),
        ("os", "unknown command 'os'"),
        ("x" * 10_000, "unknown command 'xxx"),
    ],
    ids=lambda value: value[:20],
)
def test_a_misspelt_command_is_one_line(name, message, capsys):
    assert __main__.main([name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mlx-rgemma: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and len(captured.err) < 500


HUGE = "9" * 20
BAD = {
    "generate": [
        ["--seed", HUGE],
        ["--seed", "-1"],
        ["--max-tokens", HUGE],
        ["--max-tokens", "9" * 5000],
        ["--temp", "nan"],
        ["--temp", "inf"],
        ["--temp", "1e9"],
        ["--top-k", HUGE],
        ["--min-p", "nan"],
        ["--xtc-probability", "1.1"],
        ["--xtc-threshold", "0.6"],
        ["--repetition-penalty", "1e400"],
        ["--repetition-context-size", HUGE],
        ["--prefill-step-size", HUGE],
        ["--num-draft-tokens", HUGE],
        ["--prompt-lookup", "-1"],
        ["--kv-bits", "many"],
    ],
    "chat": [["--seed", HUGE], ["--temp", "nan"], ["--xtc-threshold", "1"], ["-m", "0"]],
    "perplexity": [["--seed", HUGE], ["--batch-size", HUGE], ["--sequence-length", "1"]],
    "evaluate": [
        ["--tasks", "a", "--seed", str(2**32)],
        ["--tasks", "a", "--limit", HUGE],
        ["--tasks", "a", "--temp", "inf"],
        ["--tasks", "a", "--chat-template-args", "[" * 100_000],
    ],
    "benchmark": [
        ["-p", str(2**31 - 1)],
        ["-b", "9999"],
        ["-n", "0"],
        ["--delay", "1e300"],
        ["--delay", "nan"],
    ],
    "selftest": [["--repeat", HUGE]],
    "launches": [["--prompt", "1000000"], ["--prompt", "1"]],
}


@pytest.mark.parametrize(
    ("command", "args"),
    [(command, args) for command, cases in BAD.items() for args in cases],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_numbers_out_of_bounds_are_one_line(command, args, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(command).parse_args(args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mlx_rgemma.{command}: error: argument ")
    assert args[-2] in error.split(": ")[2]
    assert error.count("\n") == 1 and len(error) < 700


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["hello there"], "unrecognized arguments: hello there; did you mean --prompt 'hello the"),
        (["--temperature", "0.5"], "did you mean --temp?"),
        (["--max-tokns=3"], "did you mean --max-tokens?"),
        (["--qqqq"], "unrecognized arguments: --qqqq (--help"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_unknown_arguments_get_a_hint(args, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of("generate").parse_args(args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1


def test_notices_of_the_library_are_lines_of_a_command(capsys):
    import logging

    log = logging.getLogger("mlx_rgemma.cpu.numba_runtime")
    log.info("outside of a command")
    cli.run(lambda: log.info("Compiling"))
    log.info("after it")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Compiling\n")


def test_dir_shows_the_public_names():
    assert dir(mlx_rgemma) == sorted(mlx_rgemma.__all__)
    assert {"generate", "load", "Conversation", "ops"} <= set(dir(mlx_rgemma))
    assert not {"sys", "Any", "ModuleType", "importlib", "annotations"} & set(dir(mlx_rgemma))


def test_the_project_has_addresses_and_commands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["urls"]) == {"Homepage", "Repository", "Issues", "Changelog"}
    assert all(url.startswith("https://github.com/") for url in project["urls"].values())
    assert project["scripts"]["mlx-rgemma"] == "mlx_rgemma.__main__:main"


def test_no_hint_names_a_package_that_is_not_published():
    """The name on PyPI is not taken; a stranger could take it."""
    files = [*(ROOT / "mlx_rgemma").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "mlx-rgemma[" not in text and "install mlx-rgemma" not in text, file
