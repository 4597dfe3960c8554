"""Shell commands of the documentation run, with the embedded model for the released ones."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from helpers.snippets import PAGES, ROOT, Workplace, is_set_up, simple_commands, snippets


def runnable(page: str) -> list[str]:
    """Return the lines of a page's blocks that a test can run, in order."""
    lines = []
    for snippet in snippets(page, "shell"):
        if snippet.reason:
            continue
        for line in snippet.text.replace("\\\n", " ").splitlines():
            # Of `pip install . && python -m ...` only the second command is run.
            parts = [part for part in line.split(" && ") if part.strip()]
            lines += [p for p in parts if not all(map(is_set_up, simple_commands(p)))]
    return lines


RUNNABLE = {page: lines for page in PAGES if (lines := runnable(page))}


@pytest.mark.parametrize("page", RUNNABLE)
def test_commands_run(page, tmp_path):
    place = Workplace(tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{place.bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    for line in RUNNABLE[page]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", place.adapted(line)],
            cwd=place.cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_first_lines_run():
    assert any(re.match("python -m mlx_rgemma.generate", line) for line in RUNNABLE["README.md"])
