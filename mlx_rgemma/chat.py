"""The command `mlx-rgemma chat`: chat in the terminal, with the history in the state."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from mlx_rgemma import cli

if TYPE_CHECKING:
    from mlx_rgemma.sessions.conversation import Conversation
    from mlx_rgemma.sessions.session import Session

DEFAULT_MAX_TOKENS = 256
QUIT = ("q", "/q", "exit", "/exit", "/quit", "/bye")
FIRST = "main"
HELP = """\
Each line is a message, except these commands:
  q             quit; also exit, /exit, /quit, /bye, and the end of the input (Ctrl-D)
  r             reset: begin a new conversation
  h             this help; also /help, /?
  /save FILE    save the conversation
  /load FILE    continue a saved conversation, or a text that cache_prompt has read
  /fork NAME    continue in a copy called NAME; the original is kept
  /switch NAME  switch to another copy; the first one is called main
  /forks        list the copies
Ctrl-C stops an answer."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and a few more."""
    parser = cli.make_parser(
        "mlx_rgemma.chat",
        "Chat with RecurrentGemma. The history is kept in a state of constant size;"
        " nothing is read twice.",
        [
            "--model google/recurrentgemma-2b-it --temp 0.7",
            "--prompt-cache-file book.safetensors",
        ],
    )
    cli.add_model(parser)
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt-cache-file", help="State to start from, as cache_prompt or /save saves it.")
    add("--system-prompt", help="System prompt for the chat template.")
    add("--chat-template-config", help="JSON object with more arguments for the chat template.")
    add("--ignore-chat-template", action="store_true", help="Have the model continue the text.")
    cli.add_sampling(parser, DEFAULT_MAX_TOKENS)
    cli.add_state(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _chat(args), pytorch=argv is not None)


def _chat(args: argparse.Namespace) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for `input`)
    model, tokenizer = cli.load_model(args)
    chat = Chat(args, model, tokenizer)
    name = args.model or "the embedded model"
    print(f"{name}: state {chat.session.nbytes / 1e6:.3f} MB, at any length")
    print("q quits, r resets, h helps")
    while (line := _read_line()) is not None:
        if line in QUIT:
            break
        try:
            chat.take(line)
        except KeyboardInterrupt:
            _end_if_sharded()
            print("\n[stopped]", flush=True)
        except (ValueError, OSError) as error:  # a UserError is a ValueError
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _read_line() -> str | None:
    """Return the next line of input; None at its end."""
    while True:
        try:
            return input(">> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            _end_if_sharded()
            print("\nq quits")


def _end_if_sharded() -> None:
    """End all ranks on Ctrl-C: they would stop at different tokens."""
    from mlx_rgemma import distributed

    if distributed.group() is not None:
        raise KeyboardInterrupt


class Chat:
    """The conversations of one run, by name.

    Args:
        args: The command's arguments.
        model, tokenizer: From `load`.
    """

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        from mlx_rgemma.distributed.group import synchronized_sampler
        from mlx_rgemma.generation.options import SamplingOptions

        self.args, self.model, self.tokenizer = args, model, tokenizer
        sampling = SamplingOptions.of(vars(args))
        sampler, processors = sampling.functions(tokenizer, model.args.vocab_size)
        self.options = {
            "max_tokens": args.max_tokens,
            "stop": args.stop,
            "sampler": synchronized_sampler(sampler),
            "logits_processors": processors,
        }
        if args.prompt_cache_file is None:
            first = self._converse(self._new(), args.system_prompt)
        else:
            first = self._converse(self._load(args.prompt_cache_file), args.system_prompt)
        self.name = FIRST
        self.conversations = {FIRST: first}

    @property
    def session(self) -> Session:
        return self.conversations[self.name].session

    def take(self, line: str) -> None:
        """Execute a command, or answer a message.

        Raises:
            UserError: If the command or the message is refused.
        """
        from mlx_rgemma.errors import UserError

        if not line:
            return
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if line in ("h", "/h", "/help", "/?"):
            print(HELP, flush=True)
        elif line in ("r", "/r"):
            fresh = self._converse(self._new(), self.args.system_prompt)
            self.conversations[self.name] = fresh
            print("[reset]", flush=True)
        elif command in self.commands and bool(rest) == self.commands[command][1]:
            self.commands[command][0](self, rest)
        elif command in self.commands:
            names = "one name" if self.commands[command][1] else "no name"
            raise UserError(f"{command} takes {names}; see h")
        elif command.startswith("/") and command[1:].isalpha():
            raise UserError(f"{command} is not a command; h lists them")
        else:
            self._answer(line)

    def _answer(self, message: str) -> None:
        conversation = self.conversations[self.name]
        response = None
        try:
            for response in conversation.ask(message, **self.options):
                print(response.text, end="", flush=True)
        except KeyboardInterrupt:
            _end_if_sharded()
            print("\n[stopped]" if response is not None else "\n[stopped, message taken back]")
        else:
            print()
        if response is not None:
            print(
                f"  {response.generation_tokens} tokens · {response.generation_tps:.1f} tok/s ·"
                f" prompt {response.prompt_tps:.1f} tok/s · {self.session.tokens_seen} in the"
                f" state · peak {response.peak_memory:.2f} GB",
                flush=True,
            )

    def _save(self, name: str) -> None:
        file = os.path.realpath(_path(name))
        self.session.save(file)
        print(f"[saved in {file}: {self.session.tokens_seen} tokens]", flush=True)

    def _go_on(self, name: str) -> None:
        from mlx_rgemma.sessions.prompt_cache import find_state

        file = os.path.realpath(find_state(_path(name)))
        self.conversations[self.name] = self._converse(self._load(file))
        print(f"[loaded {file}: {self.session.tokens_seen} tokens]", flush=True)

    def _fork(self, name: str) -> None:
        from mlx_rgemma.errors import UserError

        if name in self.conversations:
            raise UserError(f"{name} exists already; /switch {name} switches to it")
        old = self.conversations[self.name]
        fork = self._converse(self.session.fork())
        fork.system_prompt = old.system_prompt  # if it has not been read yet
        self.conversations[name] = fork
        self.name = name
        self._forks()

    def _switch(self, name: str) -> None:
        from mlx_rgemma.errors import UserError

        if name not in self.conversations:
            raise UserError(f"there is no copy {name}, only {', '.join(self.conversations)}")
        self.name = name
        self._forks()

    def _forks(self, _: str = "") -> None:
        for name, conversation in self.conversations.items():
            here = "*" if name == self.name else " "
            print(f"{here} {name}: {conversation.session.tokens_seen} tokens", flush=True)

    commands: ClassVar[dict[str, tuple[Callable[[Chat, str], None], bool]]] = {
        "/save": (_save, True),
        "/load": (_go_on, True),
        "/fork": (_fork, True),
        "/switch": (_switch, True),
        "/forks": (_forks, False),
    }
    """The method of each command, and whether it takes an argument."""

    def _converse(self, session: Session, system_prompt: str | None = None) -> Conversation:
        from mlx_rgemma.generation.prompts import template_options
        from mlx_rgemma.sessions.conversation import Conversation

        return Conversation(
            session,
            system_prompt=system_prompt,
            use_template=not self.args.ignore_chat_template,
            options=template_options(self.args.chat_template_config),
        )

    def _new(self) -> Session:
        from mlx_rgemma.sessions.session import Session

        step = self.args.prefill_step_size
        return Session(self.model, self.tokenizer, prefill_step_size=step)

    def _load(self, name: str) -> Session:
        from mlx_rgemma.sessions.session import Session

        step = self.args.prefill_step_size
        return Session.load(_path(name), self.model, self.tokenizer, prefill_step_size=step)


def _path(name: str) -> Any:
    from pathlib import Path

    return Path(name).expanduser()


if __name__ == "__main__":
    sys.exit(main())
