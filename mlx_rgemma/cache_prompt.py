"""The command `mlx-rgemma cache_prompt`: read a text once and save the state."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mlx_rgemma import cli

if TYPE_CHECKING:
    from mlx_rgemma.sessions.session import PrefillProgress, Session


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and a few more."""
    parser = cli.make_parser(
        "mlx_rgemma.cache_prompt",
        "Read a text of any size and save the state after it, for the"
        " --prompt-cache-file of generate and chat.",
        [
            "--prompt-file book.txt --prompt-cache-file book.safetensors",
            "--prompt - --prompt-cache-file log.safetensors < server.log",
        ],
    )
    add = parser.add_argument
    cli.add_model(parser)
    cli.add_state(parser)
    add("--prompt-cache-file", required=True, help="The file to save the state in.")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", "-p", help="The text; '-' reads stdin, however long it is.")
    text.add_argument("--prompt-file", "-f", help="Read the text from a file.")
    add(
        "--ignore-chat-template",
        action="store_true",
        help="Use no chat template.",
    )
    add("--eos-token", help=argparse.SUPPRESS)
    add("--kv-group-size", type=int, help=argparse.SUPPRESS)
    add("--quantized-kv-start", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _cache_prompt(args), pytorch=argv is not None)


def _cache_prompt(args: argparse.Namespace) -> None:
    from contextlib import nullcontext
    from pathlib import Path

    from mlx_rgemma.io.atomic import check_target

    target = check_target(Path(args.prompt_cache_file).expanduser())
    if args.prompt_file is not None:
        with open(args.prompt_file, encoding="utf-8") as file:
            _read_and_save(args, file, target)
    else:
        if args.prompt == "-":
            cli.refuse_stdin("--prompt -")
        text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
        with nullcontext(sys.stdin if args.prompt == "-" else text) as source:
            _read_and_save(args, source, target)


def _read_and_save(args: argparse.Namespace, source: Any, target: Any) -> None:
    import mlx.core as mx

    from mlx_rgemma.errors import UserError
    from mlx_rgemma.generation.progress import clear_reading, source_progress
    from mlx_rgemma.sessions.conversation import OPEN, TURN, open_turn
    from mlx_rgemma.sessions.prompt_cache import save_prompt_cache
    from mlx_rgemma.sessions.session import Session

    model, tokenizer = cli.load_model(args)
    session = Session(model, tokenizer, prefill_step_size=args.prefill_step_size)
    if tokenizer.has_chat_template and not args.ignore_chat_template:
        session.feed(open_turn(tokenizer)[0])
    reading = session.feed(source, progress=source_progress(source))
    clear_reading()
    if reading.tokens == 0:
        raise UserError("the prompt is empty: it needs at least one token.")
    metadata = {"model": args.model or "embedded", TURN: OPEN}
    save_prompt_cache(target, model, session.prompt_cache(), metadata)
    _report(session, reading)
    print(f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB")
    print(f"Saved in {target}")


def _report(session: Session, reading: PrefillProgress) -> None:
    print(f"Processed {reading.tokens} tokens ({reading.tokens_per_second:.2f} tok/s)")
    print(f"State: {session.nbytes / 1e6:.3f} MB, at any length")


if __name__ == "__main__":
    sys.exit(main())
