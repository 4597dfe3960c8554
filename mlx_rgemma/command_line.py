"""What all commands share: a user's mistake is one line on stderr, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_rgemma.errors import UserError

if TYPE_CHECKING:
    from mlx_rgemma.griffin.model import Model


def run(command: Callable[[], int | None]) -> int:
    """Run a command and turn what stopped it into an exit status.

    Returns:
        The command's own status (None counts as 0), 1 after a `UserError` or an operating system
        error (told in one line on stderr), 130 after Ctrl-C, 0 when the reader of a pipe left.
    """
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Keep the interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def count(minimum: int, *, unlimited: bool = False) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `minimum` (or -1, where that means no limit)."""

    def parse(text: str) -> int:
        value = int(text)
        if value >= minimum or (unlimited and value == -1):
            return value
        no_limit = " (or -1 for no limit)" if unlimited else ""
        raise argparse.ArgumentTypeError(f"{value} is not at least {minimum}{no_limit}")

    parse.__name__ = "whole number"
    return parse


def number(minimum: float, maximum: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a number between two bounds."""

    def parse(text: str) -> float:
        value = float(text)
        if minimum <= value <= maximum:
            return value
        bounds = (
            f"between {minimum:g} and {maximum:g}" if maximum < 1e300 else f"{minimum:g} or more"
        )
        raise argparse.ArgumentTypeError(f"{text} is not {bounds}")

    parse.__name__ = "number"
    return parse


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model."""
    add = parser.add_argument
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--adapter-path", help="Folder with trained adapter weights and config.")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Default: float32 on a CPU, the file's own on a GPU.",
    )
    add(
        "--window",
        choices=("google", "hf"),
        default="google",
        help="Attention window as DeepMind's code has it (W+1 keys) or transformers' (W).",
    )
    add("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)


def add_state(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a text is read into a state."""
    add = parser.add_argument
    add(
        "--prefill-step-size",
        type=count(1),
        default=2048,
        help="Tokens to read at a time. Default: %(default)s.",
    )
    add("--max-kv-size", type=int, help=argparse.SUPPRESS)
    add("--kv-bits", type=int, help=argparse.SUPPRESS)


def load_model(args: argparse.Namespace) -> tuple[Model, Any]:
    """The model that the arguments of `add_model` and `add_state` ask for, and its tokenizer.

    Raises:
        UserError: If it cannot be loaded, or its state was to be limited, which it is by itself.
    """
    from mlx_rgemma import load
    from mlx_rgemma.griffin.cache import state_nbytes

    model, tokenizer = load(
        args.model, dtype=args.dtype, adapter_path=args.adapter_path, window=args.window
    )
    if args.kv_bits is not None or args.max_kv_size is not None:
        megabytes = state_nbytes(model.make_cache()) / 1e6
        raise UserError(
            "--kv-bits and --max-kv-size are not needed: the state is bounded already,"
            f" {megabytes:.1f} MB at any length."
        )
    return model, tokenizer
