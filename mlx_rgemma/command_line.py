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


def run(command: Callable[[], int | None], *, pytorch: bool = True) -> int:
    """Run a command and turn what stopped it into an exit status.

    Under `mlx.launch`, the other processes end when this one has failed, and are waited for when
    it has not.

    Args:
        command: What to run.
        pytorch: Whether this process may import PyTorch, where it is installed. transformers, which
            reads the tokenizer, would, which takes more than a second; a command that generates can
            do without, but another program that calls it may not.

    Returns:
        The command's own status (None counts as 0), 1 after a `UserError` or an operating system
        error (told in one line on stderr), 130 after Ctrl-C, 0 when the reader of a pipe left.
    """
    if not pytorch:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    status, problem = 1, "stopped"
    try:
        status = command() or 0
        sys.stdout.flush()
        problem = f"ended with status {status}" if status else ""
    except UserError as error:
        problem = f"stopped: {' '.join(str(error).split())}"
        status = _fail(str(error))
    except KeyboardInterrupt:
        problem = "was interrupted"
        print(file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # Keep the interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        problem = f"stopped: {where}{error.strerror or error}"
        status = _fail(f"{where}{error.strerror or error}")
    except RuntimeError:
        if (distributed := _distributed()) is not None:
            distributed.lost_by_others()
        raise
    finally:
        if (distributed := _distributed()) is not None:
            distributed.leave(problem, status, mistake=problem.startswith("stopped: "))
    return status


def _distributed() -> Any:
    """The module that joins processes, if it has been needed."""
    return sys.modules.get("mlx_rgemma.distributed.membership")


def _fail(message: str) -> int:
    distributed = _distributed()
    if distributed is None or distributed.speaks():
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def count(
    minimum: int, maximum: int | None = None, *, unlimited: bool = False
) -> Callable[[str], int]:
    """An argparse type: a whole number between two bounds (or -1, where that means no limit)."""

    def parse(text: str) -> int:
        value = int(text)
        if value >= minimum and (maximum is None or value <= maximum):
            return value
        if unlimited and value == -1:
            return value
        no_limit = " (or -1 for no limit)" if unlimited else ""
        bounds = f"at least {minimum}" if value < minimum else f"at most {maximum}"
        raise argparse.ArgumentTypeError(f"{value} is not {bounds}{no_limit}")

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


def refuse_stdin(argument: str) -> None:
    """Refuse to read stdin to its end under `mlx.launch`, which passes lines on but no end.

    Raises:
        UserError: If this process was started by it.
    """
    if "MLX_RANK" in os.environ:
        raise UserError(f"{argument} has no end under mlx.launch; give a file.")


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

    A plain tokenizer is read without transformers, which takes a second to import.
    Under `mlx.launch` it is shared by the processes.

    Raises:
        UserError: If it cannot be loaded, or its state was to be limited, which it is by itself.
    """
    import mlx.core as mx

    from mlx_rgemma import distributed, load
    from mlx_rgemma.griffin.cache import state_nbytes

    model, tokenizer = load(
        args.model,
        dtype=args.dtype,
        adapter_path=args.adapter_path,
        window=args.window,
        group=distributed.join(getattr(args, "seed", None)),
        plain=True,
    )
    if getattr(args, "seed", None) is not None:
        mx.random.seed(args.seed)  # now: loading a shared model draws numbers, too
    if model.expanded_nbytes and distributed.rank() == 0:
        print(
            f"Quantized weights are held in float32 too, {model.expanded_nbytes / 1e9:.3f} GB:"
            " faster on a CPU. MLX_RGEMMA_EXPAND=off saves that memory.",
            file=sys.stderr,
        )
    if args.kv_bits is not None or args.max_kv_size is not None:
        megabytes = state_nbytes(model.make_cache()) / 1e6
        raise UserError(
            "--kv-bits and --max-kv-size are not needed: the state is bounded already,"
            f" {megabytes:.1f} MB at any length."
        )
    return model, tokenizer
