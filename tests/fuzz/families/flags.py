"""The command line: every flag of every command with values that it was not made for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from random import Random

from fuzz.job import Box, Family, Job
from fuzz.payloads import files
from fuzz.sources import LORA, TRAIN

COMMANDS = (
    "generate",
    "convert",
    "fuse",
    "lora",
    "train",
    "cache_prompt",
    "chat",
    "perplexity",
    "quantize",
    "benchmark",
    "server",
)
VALUES = (
    "",
    " ",
    "0",
    "1",
    "-1",
    "2",
    "3",
    "-0",
    "1_0",
    "\u0661",
    "0x10",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e-999",
    "1e400",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "99999999999999999999",
    "-9223372036854775809",
    "9" * 5000,
    "x" * 20_000,
    "a",
    "true",
    "none",
    "auto",
    "\x1b[2J\x1b]0;owned\a",
    "a\nb\rc",
    "é漢😀",
    "\udcff",
    "{}",
    "[]",
    "{",
    '{"a": NaN}',
    '{"chat_template": "{{ 1 / 0 }}"}',
    "[" * 20_000,
    "nowhere",
    "nowhere/deeper/x",
    "d" * 300,
    "owner/name",
    "owner/name/more",
    "~nobody/x",
    "file",
    "file/x",
    "folder",
    ".",
    "/dev/null/x",
    "500MB",
    "1,2,3",
    "1,,2",
    "float16",
    "-",
)
FORBIDDEN = ("--help", "-h", "--upload-repo", "--compare")
AMOUNTS = (
    "iters",
    "max_tokens",
    "num_trials",
    "generation_tokens",
    "prompt_tokens",
    "after",
    "warmup",
    "delay",
)


def flag_options(command: str) -> list[tuple[str, argparse.Action]]:
    """Return the flags of a command with their argparse actions."""
    parser = importlib.import_module(f"mlx_rgemma.{command}").build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices["compare"]
    found = []
    for action in parser._actions:
        if action.option_strings and action.option_strings[-1] not in FORBIDDEN:
            found.append((action.option_strings[-1], action))
    return found


def base(command: str, box: Box) -> tuple[list[str], tuple[str, ...]]:
    """Return sound arguments of a command that does little, and what they make."""
    tiny, out = str(box.sources / "tiny"), str(box.out)
    model = ["--model", tiny]
    data = str(box.sources / "data")
    text = str(box.sources / "texts" / "a.txt")
    return {
        "generate": ([*model, "-p", "A cat", "-m", "2"], ()),
        "convert": (["--hf-path", tiny, "--mlx-path", out], ("out",)),
        "fuse": (
            [*model, "--adapter-path", str(box.sources / "adapters"), "--save-path", out],
            ("out",),
        ),
        "lora": (
            [*model, "--train", "--data", data, "--iters", "1", *LORA, "--adapter-path", out],
            ("out",),
        ),
        "train": (
            ["--data", str(box.sources / "texts"), "--save-path", out, "--iters", "1", *TRAIN],
            ("out",),
        ),
        "cache_prompt": (
            [*model, "-p", "A cat", "--prompt-cache-file", f"{out}.safetensors"],
            ("out.safetensors",),
        ),
        "chat": ([*model, "-m", "2"], ()),
        "perplexity": (
            [*model, "--data-path", text, "--num-samples", "1", "--batch-size", "1"],
            (),
        ),
        "quantize": (
            [
                "compare",
                *model,
                "--data-path",
                text,
                "--num-samples",
                "1",
                "--setting",
                "--q-bits 4 --q-group-size 32",
            ],
            (),
        ),
        "benchmark": ([*model, "-p", "8", "-g", "2", "-n", "1", "--warmup", "0"], ()),
        "server": ([*model, "--port", "0"], ()),
    }[command]


def _job(box: Box, command: str, more: list[str], note: str) -> Job:
    argv, target = base(command, box)
    (box.cwd / "file").write_text("A cat.\n")
    (box.cwd / "folder").mkdir()
    return Job(
        command,
        [*argv, *more],
        f"{command} {note}",
        # A flag may name another place to write to: below the working folder, in these cases.
        (*target, "cwd"),
        runs=command in ("lora", "train"),
        stdin="Hello\n/save state\n/load state\nq\n" if command == "chat" else "A cat.",
        interrupt=True,
        until="Serving at" if command == "server" else "",
    )


def _flags(box: Box, rng: Random) -> Job:
    command = rng.choice(COMMANDS)
    options, more = flag_options(command), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        flag, action = rng.choice(options)
        if action.nargs == 0:
            more.append(flag)
            continue
        value = rng.choice(VALUES)
        if action.choices and rng.random() < 0.5:
            value = str(rng.choice(list(action.choices)))
        if rng.random() < 0.5:
            more += [flag, value]
        else:
            more.append(f"{flag}={value}")
    note = " ".join(v if len(v) < 60 else f"{v[:40]}... ({len(v)})" for v in more)
    return _job(box, command, more, repr(note))


def _stored(content: bytes) -> Callable[[Box, Random], Job]:
    command, *more = content.decode().split()
    return lambda box, rng: _job(box, command, more, " ".join(more))


FAMILIES = (
    Family(
        "flags",
        "command",
        {f"sound {name}": _stored(name.encode()) for name in COMMANDS},
        _flags,
        {name: _stored(content) for name, content in files("flags").items()},
    ),
)
