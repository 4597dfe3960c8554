"""A chat with the server (`python -m mlx_rgemma.server`), in nothing but the standard library.

    python examples/chat_client.py [--url http://127.0.0.1:8080/v1] [--max-tokens 200]

An empty line or Ctrl-D ends it, `r` starts anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator


def answer(url: str, messages: list[dict[str, str]], max_tokens: int) -> Iterator[str]:
    """The pieces of the server's answer, as they come."""
    body = {"messages": messages, "max_tokens": max_tokens, "stream": True}
    request = urllib.request.Request(
        f"{url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if not line.startswith(b"data: ") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a server.")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        if text == "r":
            messages = []
            continue
        messages.append({"role": "user", "content": text})
        pieces = []
        try:
            for piece in answer(args.url, messages, args.max_tokens):
                pieces.append(piece)
                print(piece, end="", flush=True)
            print()
        except urllib.error.HTTPError as error:
            sys.exit(f"error: {json.loads(error.read())['error']['message']}")
        except OSError as error:
            sys.exit(f"error: {args.url}: {error}")
        messages.append({"role": "assistant", "content": "".join(pieces)})


if __name__ == "__main__":
    main()
