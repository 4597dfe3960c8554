"""Draw terminal.svg, a recording of a command, beside this file.

    python docs/images/terminal.py

It runs the command with the embedded model, and draws what the command prints. Lines appear one
after the other; viewers without animation show all of them.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap
from html import escape
from pathlib import Path

COMMAND = 'python -m mlx_rgemma.generate --prompt "Once upon a time" --temp 0.8 --seed 1'
COLUMNS = 84
LINE, MARGIN, TOP = 22, 20, 58
SECONDS_PER_LINE = 0.35
COMMAND_STYLE, NOTE_STYLE = "#7ee787", "#9198a1"


def record(command: str) -> list[tuple[str, str]]:
    """Run a command; return its lines as they fill a terminal, each with its color."""
    _, *arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    lines = [(f"$ {command}", COMMAND_STYLE)]
    lines += [(line, NOTE_STYLE) for line in wrapped(done.stderr)]
    return lines + [(line, "#e6edf3") for line in wrapped(done.stdout)]


def wrapped(text: str) -> list[str]:
    """Return the lines of a text, none longer than the terminal is wide."""
    lines = text.rstrip("\n").split("\n")
    return [part for line in lines for part in textwrap.wrap(line, COLUMNS) or [""]]


def picture(lines: list[tuple[str, str]]) -> str:
    """Return the recording as SVG."""
    height = TOP + LINE * len(lines) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height}" width="840"'
        ' font-family="ui-monospace, Menlo, Consolas, monospace" font-size="15"'
        f' height="{height}" role="img">',
        "<title>Generating a story with the embedded model</title>",
        "<style>text {"
        " white-space: pre; animation: show 0.01s backwards }"
        " @keyframes show { from { opacity: 0 } }</style>",
        f'<rect width="840" height="{height}" rx="10" fill="#161b22" stroke="#30363d"/>',
    ]
    for i, color in enumerate(("#ff5f57", "#febc2e", "#28c840")):
        parts.append(f'<circle cx="{24 + 20 * i}" cy="22" r="6" fill="{color}"/>')
    for i, (line, color) in enumerate(lines):
        delay = 0.0 if i == 0 else 0.6 + SECONDS_PER_LINE * i
        parts.append(
            f'<text x="{MARGIN}" y="{TOP + LINE * i}" fill="{color}"'
            f' style="animation-delay: {delay:.2f}s" xml:space="preserve">{escape(line)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    target = Path(__file__).with_name("terminal.svg")
    target.write_text(picture(record(COMMAND)), encoding="utf-8")
