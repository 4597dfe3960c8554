"""The regression corpus: what is stored as small files in `corpus/<family>/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"


def files(family: str) -> dict[str, bytes]:
    """Return the stored files of a family by their names without suffix."""
    return {path.stem: path.read_bytes() for path in sorted((CORPUS / family).iterdir())}


def overlays(family: str) -> dict[str, dict[str, Any]]:
    """Return the stored JSON objects of a family; each replaces keys of a sound file."""
    return {name: json.loads(content) for name, content in files(family).items()}


ACCEPTED = frozenset(
    {
        "config:remote-code",
        "flags:cache-prompt-no-suffix",
        "flags:lora-resume-without-checkpoint",
        "resumed:no checkpoint yet",
        "yaml:train-float-iters",
        "sentencepiece:no utf-8",
    }
)
"""Payloads that may also be accepted, if nothing bad comes of it; the others must be refused."""
