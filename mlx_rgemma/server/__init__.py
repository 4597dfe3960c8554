"""An OpenAI-compatible server: mlx-lm's, with checks, access control and bounded memory."""

from __future__ import annotations

import argparse


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    from mlx_rgemma.server.command import build_parser

    return build_parser()


def main(argv: list[str] | None = None) -> int:
    """Run the command `mlx_rgemma.server`; return its exit status."""
    from mlx_rgemma.server.command import main

    return main(argv)
