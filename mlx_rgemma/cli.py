"""Shared code of the commands: arguments, exit status, errors as one line on stderr."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from mlx_rgemma import __version__
from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.generation.options import BOUNDS, MAX_COUNT, SamplingOptions

if TYPE_CHECKING:
    from mlx_rgemma.griffin.model import Model

PROGRAM = "mlx-rgemma"
"""The command with all others as sub-commands."""

MAX_LINE = 500
"""Characters of an error on the terminal."""


def run(command: Callable[[], int | None], *, pytorch: bool = True) -> int:
    """Run a command and return its exit status.

    Under `mlx.launch`, a failure ends all ranks; otherwise they wait for one another.

    Args:
        command: The function to run.
        pytorch: Whether this process may import PyTorch. transformers would import it with the
            tokenizer, which takes more than a second and is not needed to generate. A program that
            calls `main` may need it.

    Returns:
        The status of the command (None counts as 0); 1 after a `UserError` or an operating system
        error (one line on stderr); 130 after Ctrl-C; 0 if the reader of a pipe has closed it.
    """
    if not pytorch:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    status, problem = 1, "stopped"
    try:
        with _notices():
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
        # Avoid a second error when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        problem = f"stopped: {where}{error.strerror or error}"
        status = _fail(f"{where}{error.strerror or error}")
    except RuntimeError:
        if (distributed := _distributed()) is not None:
            distributed.wait_for_failure_report()
        raise
    finally:
        if (distributed := _distributed()) is not None:
            distributed.leave(problem, status, mistake=problem.startswith("stopped: "))
    return status


def _distributed() -> Any:
    """Return `mlx_rgemma.distributed.group` if it has been imported."""
    return sys.modules.get("mlx_rgemma.distributed.group")


def _fail(message: str) -> int:
    distributed = _distributed()
    if distributed is None or distributed.is_main_process():
        print(f"error: {one_line(message)}", file=sys.stderr)
    return 1


def one_line(message: str) -> str:
    """Return a message as one printable line of bounded length, for a terminal.

    Values from outside are cut where a message quotes them; file names are not. A long message
    loses its middle: the end says what to do.
    """
    text = " ".join(message[: 100 * MAX_LINE].split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) <= MAX_LINE:
        return text
    return f"{text[: 2 * MAX_LINE // 3]}...{text[-MAX_LINE // 3 :]}"


@contextmanager
def _notices() -> Iterator[None]:
    """Print the log messages of `mlx_rgemma.ops` on stderr, one per line."""
    handler, log = _Notices(), logging.getLogger("mlx_rgemma")
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        distributed = _distributed()
        if distributed is None or distributed.rank() == 0:
            over = "\r\033[K" if sys.stderr.isatty() else ""  # may hold a progress line
            print(over + record.getMessage(), file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors that suggest the closest known argument."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown[0])}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists the arguments)\n")

    def _hint(self, argument: str) -> str:
        options = self._option_string_actions
        if argument.startswith("-"):
            closest = get_close_matches(argument.partition("=")[0], options, n=1)
            return f"; did you mean {closest[0]}?" if closest else ""
        return f"; did you mean --prompt {shown(argument)}?" if "--prompt" in options else ""


def make_parser(
    prog: str,
    description: str,
    examples: Sequence[str] = (),
    *,
    epilog: str = "",
    **options: Any,
) -> argparse.ArgumentParser:
    """Return a command's parser, with `--version`, and examples at the end of `--help`.

    Args:
        prog: The command's name, as in "mlx_rgemma.generate".
        description: One sentence.
        examples: Arguments of complete commands, quoted for the shell.
        epilog: Text before the examples.
        **options: More arguments of `argparse.ArgumentParser`.
    """
    command = f"{PROGRAM} {prog.removeprefix('mlx_rgemma.')}"
    if sys.argv[0] == command:  # set by `mlx_rgemma.__main__`
        prog = command
    width = max(shutil.get_terminal_size().columns - 2, 20)
    parts = [textwrap.fill(epilog, width)] if epilog else []
    if examples:
        parts.append("\n".join(["examples:", *(f"  {prog} {example}" for example in examples)]))
    parser = Parser(
        prog=prog,
        description=textwrap.fill(description, width),
        epilog="\n\n".join(parts).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
        help="Print the version and exit.",
    )
    return parser


def int_at_least(
    minimum: int, maximum: int = MAX_COUNT, *, unlimited: bool = False
) -> Callable[[str], int]:
    """Return an argparse type: an integer between bounds (or -1 for no limit, if `unlimited`)."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid integer value: {shown(text)}") from None
        no_limit = " (or -1 for no limit)" if unlimited else ""
        if value < minimum and not (unlimited and value == -1):
            raise argparse.ArgumentTypeError(f"{shown(value)} is not at least {minimum}{no_limit}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{shown(value)} is not at most {maximum}{no_limit}")
        return value

    return parse


def float_between(minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite number between two bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid number value: {shown(text)}") from None
        if minimum <= value <= maximum and math.isfinite(value):
            return value
        bounds = (
            f"between {minimum:g} and {maximum:g}" if maximum < 1e300 else f"{minimum:g} or more"
        )
        raise argparse.ArgumentTypeError(f"{shown(value)} is not {bounds}")

    return parse


def refuse_stdin(argument: str) -> None:
    """Refuse to read stdin under `mlx.launch`, which forwards lines but never the end of file.

    Raises:
        UserError: If this process was started by `mlx.launch`.
    """
    if "MLX_RANK" in os.environ:
        raise UserError(f"{argument} never ends under mlx.launch; use a file.")


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the arguments that select a model; return their group."""
    group = parser.add_argument_group("model")
    add = group.add_argument
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
    return group


def add_state(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the arguments of prefill; return their group."""
    group = parser.add_argument_group("speed")
    add = group.add_argument
    add(
        "--prefill-step-size",
        type=int_at_least(1),
        default=2048,
        help="Tokens to read at a time. Default: %(default)s.",
    )
    add("--max-kv-size", type=int_at_least(0), help=argparse.SUPPRESS)
    add("--kv-bits", type=int_at_least(0), help=argparse.SUPPRESS)
    return group


SAMPLING_HELP = {
    "temp": "Sampling temperature. Default: 0, greedy.",
    "top_p": "Sampling top-p. Default: 1, all tokens.",
    "min_p": "Sampling min-p. Default: 0, all tokens.",
    "top_k": "Sampling top-k. Default: 0, all tokens.",
    "min_tokens_to_keep": "Tokens that min-p keeps. Default: 1.",
    "xtc_probability": "Probability of XTC sampling. Default: 0.",
    "xtc_threshold": "Threshold of XTC sampling. Default: 0.1.",
    "repetition_penalty": "Penalty for recent tokens. Default: none.",
    "repetition_context_size": "Recent tokens that the penalty covers. Default: 20.",
    "seed": "Seed of the random numbers.",
}


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the arguments of sampling.

    Args:
        parser: The command's parser.
        max_tokens: Default of `--max-tokens`.
    """
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--max-tokens",
        "-m",
        type=int_at_least(1, unlimited=True),
        default=max_tokens,
        help="Tokens to generate at most; -1 for no limit. Default: %(default)s.",
    )
    add("--stop", action="append", default=[], help="Text that ends the generation; repeatable.")
    defaults = SamplingOptions()
    for name in SAMPLING_HELP:
        add_option(add, name, getattr(defaults, name))


def add_option(add: Callable[..., Any], name: str, default: Any) -> None:
    """Add one argument of `SAMPLING_HELP`, with its bounds."""
    low, high = BOUNDS[name]
    kind = int_at_least(int(low), int(high)) if high >= MAX_COUNT else float_between(low, high)
    add(f"--{name.replace('_', '-')}", type=kind, default=default, help=SAMPLING_HELP[name])


def load_model(args: argparse.Namespace) -> tuple[Model, Any]:
    """Load the model of the arguments of `add_model` and `add_state`, and its tokenizer.

    The embedded model's tokenizer is loaded without transformers, which takes a second to import.
    Under `mlx.launch` the model is sharded.

    Raises:
        UserError: If it cannot be loaded, or the arguments limit the state, which is constant.
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
        mx.random.seed(args.seed)  # after loading, which draws random numbers for sharded models
    if model.dequantized_nbytes and distributed.rank() == 0:
        print(
            f"Quantized weights are held in float32 too, {model.dequantized_nbytes / 1e9:.3f} GB:"
            " faster on a CPU. MLX_RGEMMA_DEQUANTIZE=off saves that memory.",
            file=sys.stderr,
        )
    if args.kv_bits is not None or args.max_kv_size is not None:
        megabytes = state_nbytes(model.make_cache()) / 1e6
        raise UserError(
            "--kv-bits and --max-kv-size are not needed: the state is bounded already,"
            f" {megabytes:.1f} MB at any length."
        )
    return model, tokenizer
