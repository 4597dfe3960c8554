"""Questions and answers in one session: each turn is read once, in the model's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.response import GenerationResponse
from mlx_rgemma.io.reading import reason
from mlx_rgemma.sessions.session import Session, Snapshot

TURN = "turn"
OPEN = "open"
"""What a session's metadata say of a text that the user has not finished: `cache_prompt`'s."""

MLX_LM = "tokenizer_config"
"""What the prompt caches of mlx-lm's own `cache_prompt` hold; they end in an open turn, too."""

MARK = "WHAT-STANDS-HERE-IS-REPLACED"


class Conversation:
    """A session in which a user and a model take turns.

    With a chat template, a turn is what the template puts behind the answer before: the history
    is in the state, and nothing is read again. Without one, each message begins a new line of
    the text that the model goes on with.

    Args:
        session: The session, which may have begun.
        system_prompt: A system message, where the conversation begins.
        use_template: Whether to use the model's chat template, if it has one.
        options: More arguments for the template.

    Raises:
        UserError: If there is a system prompt but no template, or no beginning to put it at.
    """

    def __init__(
        self,
        session: Session,
        *,
        system_prompt: str | None = None,
        use_template: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.session = session
        self.system_prompt = system_prompt
        self.template = use_template and session.tokenizer.has_chat_template
        self.options = dict(options or {})
        if system_prompt is not None and not self.template:
            raise UserError("a system prompt needs a chat template, which is not used here.")
        if system_prompt is not None and session.tokens_seen:
            raise UserError("a system prompt belongs at the beginning of a conversation.")

    def ask(self, message: str, **kwargs: Any) -> Iterator[GenerationResponse]:
        """Read a message and write the answer.

        An answer may be left at any moment; the next message then follows what was written. A
        message whose answer has not begun is taken back.

        Args:
            message: What the user says.
            **kwargs: As for `Session.stream`.

        Raises:
            UserError: If the template refuses the message, or `Session.stream` does.
        """
        text = self.turn(message)
        before: Snapshot | None = self.session.mark()
        for key in (TURN, MLX_LM):
            self.session.metadata.pop(key, None)
        try:
            for response in self.session.stream(text, **kwargs):
                before = None
                yield response
        finally:
            if before is not None:
                self.session.rewind(before)

    def turn(self, message: str) -> str:
        """The text to read for a message: what the template puts around it.

        Raises:
            UserError: If the template refuses the message.
        """
        session, tokenizer = self.session, self.session.tokenizer
        is_open = session.metadata.get(TURN) == OPEN or MLX_LM in session.metadata
        begun = session.tokens_seen > 0
        if not self.template:
            return message if is_open or not begun else "\n" + message
        if is_open:
            _, rest = open_turn(tokenizer, **self.options)
            return message + rest
        question: dict[str, Any] = {"role": "user", "content": message}
        if not begun:
            system: dict[str, Any] = {"role": "system", "content": self.system_prompt}
            messages = [question] if self.system_prompt is None else [system, question]
            return render(tokenizer, messages, add_generation_prompt=True, **self.options)
        history = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": MARK},
            question,
        ]
        text = render(tokenizer, history, add_generation_prompt=True, **self.options)
        text = _split(text)[1]
        last = session.last_token
        if last is not None and last in tokenizer.eos_token_ids:
            # The model has ended its turn itself.
            text = text.removeprefix(tokenizer.convert_ids_to_tokens(last))
        return text


def open_turn(tokenizer: Any, **options: Any) -> tuple[str, str]:
    """What a chat template puts before a user's first message, and behind it.

    Raises:
        UserError: If the template refuses a user's message.
    """
    message = {"role": "user", "content": MARK}
    return _split(render(tokenizer, [message], add_generation_prompt=True, **options))


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text of some messages.

    Raises:
        UserError: If the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates raise errors of their own making
        raise UserError(
            f"the model's chat template refuses the message: {reason(error)}."
        ) from error


def _split(text: str) -> tuple[str, str]:
    before, mark, after = text.partition(MARK)
    if not mark:
        raise UserError("the model's chat template drops messages: it cannot go on turn by turn.")
    return before, after
