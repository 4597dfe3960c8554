"""The command `python -m mlx_rgemma.server`: OpenAI's protocol, through mlx-lm's server."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mlx_rgemma import command_line

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """An argparse type: bytes, as in 500MB or 2GB."""
    number = text.upper().rstrip("KMGB")
    value = int(float(number) * UNITS[text.upper()[len(number) :]])
    if value < 0:
        raise ValueError(text)
    return value


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    import json

    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments: mlx-lm's, and a few more."""
    parser = command_line.make_parser(
        "mlx_rgemma.server",
        "Serve RecurrentGemma: OpenAI's chat and text completions, in batches,"
        " with a state of fixed size for each conversation.",
        ["--model google/recurrentgemma-2b-it", "--port 8081 --temp 0.7 --max-tokens 1024"],
    )
    count, number = command_line.count, command_line.number
    add = parser.add_argument
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--adapter-path", help="Folder with trained adapter weights and config.")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Default: float32 on a CPU, the file's own on a GPU.",
    )
    add("--host", default="127.0.0.1", help="Address to listen on. Default: %(default)s.")
    add("--port", type=count(0), default=8080, help="Default: %(default)s; 0 for any.")
    add(
        "--allowed-origins",
        type=lambda text: text.split(","),
        default="*",
        help="Web pages' origins that may ask. Default: all.",
    )
    add(
        "--max-requests",
        type=count(1),
        default=256,
        help="Requests taken at a time; more are answered with 429. Default: %(default)s.",
    )
    add("--draft-model", help="A smaller model; requests are then served one by one.")
    add("--num-draft-tokens", type=count(1), default=3, help="Tokens it proposes at a time.")
    add("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    add("--chat-template", default="", help="A chat template instead of the tokenizer's.")
    add("--use-default-chat-template", action="store_true", help="Where the model has none.")
    add("--chat-template-args", type=json_object, default={}, help="JSON object for the template.")
    add("--temp", type=number(0), default=0.0, help="Default temperature. Default: 0, greedy.")
    add("--top-p", type=number(0, 1), default=1.0, help="Default top-p.")
    add("--top-k", type=count(0), default=0, help="Default top-k; 0 for all.")
    add("--min-p", type=number(0, 1), default=0.0, help="Default min-p.")
    add("--max-tokens", type=count(1), default=512, help="Default length. Default: %(default)s.")
    add("--decode-concurrency", type=count(1), default=32, help="Answers written together.")
    add("--prompt-concurrency", type=count(1), default=8, help="Prompts read together.")
    add("--prefill-step-size", type=count(1), default=2048, help="Prompt tokens read at a time.")
    add(
        "--prompt-cache-size",
        type=count(0),
        default=10,
        help="States kept for later turns. Default: %(default)s.",
    )
    add("--prompt-cache-bytes", type=size, help="Bytes of states kept, as in 500MB.")
    add("--kv-bits", type=int, help=argparse.SUPPRESS)
    add("--max-kv-size", type=int, help=argparse.SUPPRESS)
    # mlx-lm's server reads these too.
    unused = {"kv_group_size": 64, "quantized_kv_start": 0}
    parser.set_defaults(trust_remote_code=False, pipeline=False, **unused)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    return command_line.run(lambda: _serve(args), pytorch=argv is not None)


def _serve(args: argparse.Namespace) -> None:
    from mlx_rgemma.errors import UserError

    if args.kv_bits is not None or args.max_kv_size is not None:
        raise UserError("--kv-bits and --max-kv-size are not needed: the state is bounded already.")
    from mlx_rgemma.serving.model_server import serve

    serve(args)


if __name__ == "__main__":
    sys.exit(main())
