"""The command `mlx-rgemma`, also `python -m mlx_rgemma`, with all commands as sub-commands."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches

from mlx_rgemma import __version__
from mlx_rgemma.errors import shown

COMMANDS = {
    "generate": "Generate text from a prompt",
    "chat": "Chat in the terminal",
    "server": "Serve OpenAI's API over HTTP",
    "cache_prompt": "Read a long text once and save its state",
    "convert": "Convert and quantize a checkpoint",
    "quantize": "Compare quantizations, or learn one",
    "lora": "Fine-tune with LoRA, QLoRA, DoRA, or in full",
    "fuse": "Fuse trained adapters into their model",
    "train": "Train a model from scratch",
    "perplexity": "Measure how well a model predicts a text",
    "evaluate": "Run tasks of the lm-evaluation-harness",
    "benchmark": "Measure speed and memory",
    "selftest": "Check the Metal kernels on this machine",
    "launches": "Count the kernel launches of a model",
}

MENU = """\
usage: mlx-rgemma COMMAND [arguments]

RecurrentGemma on Apple's MLX. Commands:
{commands}

mlx-rgemma COMMAND --help shows a command's arguments, mlx-rgemma --version the version.
First steps:  mlx-rgemma generate --prompt "Once upon a time"
"""


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; return its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(menu(), end="")
        return 0
    if name == "--version":
        print(f"mlx-rgemma {__version__}")
        return 0
    command = name.replace("-", "_")
    if command not in COMMANDS:
        closest = get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {closest[0]}?" if closest else f"one of {', '.join(COMMANDS)}."
        print(f"mlx-rgemma: error: unknown command {shown(name)}; {hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"mlx_rgemma.{command}")
    if argv is not None:
        return int(module.main(rest))
    sys.argv = [f"mlx-rgemma {command}", *rest]  # the name in `make_parser`'s usage line
    return int(module.main())


def menu() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return MENU.format(commands="\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
