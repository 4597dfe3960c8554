"""Read a book once, then ask as many questions as you like, each of a copy of the state.

    python examples/ask_a_book.py --book book.txt --model google/recurrentgemma-2b-it \\
        --question "Who is the narrator?" --question "Where does the story begin?"

With --state the reading is kept in a file, and the next time not repeated. Be warned: past the
attention window (2,048 tokens for the released models) the state is a summary, which does not
remember every word. Without arguments, the small embedded model continues a few short stories.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlx_rgemma import Session, load
from mlx_rgemma.io.text import DEFAULT_TEXT
from mlx_rgemma.sessions.conversation import OPEN, TURN, Conversation, open_turn
from mlx_rgemma.sessions.session import PrefillProgress

QUESTIONS = ["\nThe little girl", "\nThe dog"]


def read(session: Session, book: Path) -> None:
    """Feed the book, as the beginning of a user's message where the model knows turns."""

    def show(reading: PrefillProgress) -> None:
        print(f"\r{reading.tokens} tokens, {reading.tokens_per_second:.0f} tokens/s", end="")

    if session.tokenizer.has_chat_template:
        session.feed(open_turn(session.tokenizer)[0])
    with open(book, encoding="utf-8") as file:
        session.feed(file, progress=show)
    session.metadata[TURN] = OPEN
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or repository; default: the embedded model")
    parser.add_argument("--book", type=Path, default=DEFAULT_TEXT, help="a text file")
    parser.add_argument("--state", type=Path, help="file that keeps what was read")
    parser.add_argument("--question", action="append", help="repeatable")
    parser.add_argument("--max-tokens", type=int, default=60, help="tokens of an answer")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    if args.state is not None and args.state.exists():
        session = Session.load(args.state, model, tokenizer)
    else:
        session = Session(model, tokenizer)
        read(session, args.book)
        if args.state is not None:
            session.save(args.state)
    print(f"{session.tokens_seen} tokens in {session.nbytes / 1e6:.3f} MB")
    for question in args.question or QUESTIONS:
        print(f"\n> {question.strip()}")
        for response in Conversation(session.fork()).ask(question, max_tokens=args.max_tokens):
            print(response.text, end="", flush=True)
        print()


if __name__ == "__main__":
    sys.exit(main())
