"""The command `mlx-rgemma server`: OpenAI's protocol with mlx-lm's server."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mlx_rgemma import cli
from mlx_rgemma.errors import shown

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Parse an argument in bytes, as in 500MB or 2GB."""
    number = text.upper().rstrip("KMGB")
    unit = UNITS.get(text.upper()[len(number) :])
    value = float(number) * (unit or 0)
    if unit is None or not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a size such as 500MB or 2GB")
    return int(value)


def api_key(text: str) -> str:
    """Parse an API key; the message of a refusal does not repeat it."""
    from mlx_rgemma.server.access import is_key

    if not is_key(text):
        raise argparse.ArgumentTypeError("a key has 1 to 256 visible ASCII characters and no comma")
    return text


def origins(text: str) -> list[str]:
    """Parse a list of origins, separated by commas."""
    return [origin.strip() for origin in text.split(",") if origin.strip()]


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    import json

    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments: mlx-lm's, and a few more."""
    parser = cli.make_parser(
        "mlx_rgemma.server",
        "Serve RecurrentGemma: OpenAI's chat and text completions, in batches,"
        " with a state of fixed size for each conversation.",
        ["--model google/recurrentgemma-2b-it", "--port 8081 --temp 0.7 --max-tokens 1024"],
    )
    integer, number = cli.int_at_least, cli.float_between
    add = parser.add_argument
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--adapter-path", help="Folder with trained adapter weights and config.")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Default: float32 on a CPU, the file's own on a GPU.",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="Address to listen on. Default: %(default)s, which only this machine can reach;"
        " 0.0.0.0 is all of its addresses: set an API key then.",
    )
    add("--port", type=integer(0, 65535), default=8080, help="Default: %(default)s; 0 for any.")
    add(
        "--allowed-origins",
        type=origins,
        default=[],
        metavar="ORIGINS",
        help="Origins of web pages that may use the server, separated by commas, as in"
        " https://chat.example.org; * for all. Default: only pages of this machine.",
    )
    add(
        "--api-key",
        type=api_key,
        action="append",
        default=[],
        metavar="KEY",
        help="Key that a request must carry (Authorization: Bearer KEY). May be repeated; the"
        " environment variable MLX_RGEMMA_API_KEY holds keys, too, separated by commas, and is not"
        " seen in the list of processes. Requests with the same key share states.",
    )
    add(
        "--max-request-bytes",
        type=size,
        default="2MB",
        help="Largest request that is read. Default: %(default)s, about 500,000 tokens of prompt.",
    )
    add(
        "--max-requests",
        type=integer(1, 65536),
        default=256,
        help="Requests accepted at a time; more are answered with 429. Default: %(default)s.",
    )
    add("--draft-model", help="A smaller model; requests are then served one by one.")
    add("--num-draft-tokens", type=integer(1), default=3, help="Tokens drafted per pass.")
    add("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    add("--chat-template", default="", help="A chat template instead of the tokenizer's.")
    add("--use-default-chat-template", action="store_true", help="If the model has none.")
    add("--chat-template-args", type=json_object, default={}, help="JSON object for the template.")
    add("--temp", type=number(0, 100), default=0.0, help="Default temperature. Default: 0, greedy.")
    add("--top-p", type=number(0, 1), default=1.0, help="Default top-p.")
    add("--top-k", type=integer(0), default=0, help="Default top-k; 0 for all.")
    add("--min-p", type=number(0, 1), default=0.0, help="Default min-p.")
    add("--max-tokens", type=integer(1), default=512, help="Default length. Default: %(default)s.")
    add("--decode-concurrency", type=integer(1), default=32, help="Sequences decoded together.")
    add("--prompt-concurrency", type=integer(1), default=8, help="Prompts read together.")
    add("--prefill-step-size", type=integer(1), default=2048, help="Prompt tokens read at a time.")
    add(
        "--prompt-cache-size",
        type=integer(0),
        default=10,
        help="States kept for later turns. Default: %(default)s.",
    )
    add("--prompt-cache-bytes", type=size, help="Bytes of states kept, as in 500MB.")
    add("--kv-bits", type=int, help=argparse.SUPPRESS)
    add("--max-kv-size", type=int, help=argparse.SUPPRESS)
    # Read by mlx-lm's server.
    unused = {"kv_group_size": 64, "quantized_kv_start": 0}
    parser.set_defaults(trust_remote_code=False, pipeline=False, **unused)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _serve(args), pytorch=argv is not None)


def _serve(args: argparse.Namespace) -> None:
    from mlx_rgemma.errors import UserError

    if args.kv_bits is not None or args.max_kv_size is not None:
        raise UserError("--kv-bits and --max-kv-size are not needed: the state is bounded already.")
    from mlx_rgemma.server.engine import serve

    serve(args)


if __name__ == "__main__":
    sys.exit(main())
