"""Chat in one session: each turn is read once, in the model's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.response import GenerationResponse
from mlx_rgemma.io.reading import reason
from mlx_rgemma.sessions.session import Session, Snapshot

TURN = "turn"
OPEN = "open"
"""Metadata of a session whose user turn is unfinished, as `cache_prompt` saves it."""

MLX_LM = "tokenizer_config"
"""Metadata key of prompt caches of mlx-lm's `cache_prompt`, which end in an open turn as well."""

MARK = "THIS-TEXT-IS-REPLACED"


class Conversation:
    """A chat between a user and a model in one session.

    The history is in the state and never read again. With a chat template, a turn is the text that
    the template inserts after the previous answer. Without one, each message begins a new line.

    Args:
        session: The session, empty or not.
        system_prompt: A system message, at the start of the conversation.
        use_template: Whether to use the model's chat template, if it has one.
        options: More arguments for the template.

    Raises:
        UserError: If there is a system prompt without a template, or in a session that is not
            empty.
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
        """Read a message and generate the answer.

        The generator may be closed at any time; the next message then follows the part that was
        generated. If generation fails before the first token, the session is rolled back.

        Args:
            message: The user's message.
            **kwargs: As for `Session.stream`.

        Raises:
            UserError: If the template or `Session.stream` refuses the message.
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
        """Return the text to read for a message, with the template's text around it.

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
            # The model has generated the end of its turn.
            text = text.removeprefix(tokenizer.convert_ids_to_tokens(last))
        return text


def open_turn(tokenizer: Any, **options: Any) -> tuple[str, str]:
    """Return the chat template's text before and after a user's first message.

    Raises:
        UserError: If the template refuses a user's message.
    """
    message = {"role": "user", "content": MARK}
    return _split(render(tokenizer, [message], add_generation_prompt=True, **options))


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return messages in the chat template.

    Raises:
        UserError: If the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text
    except Exception as error:  # templates may raise any error
        raise UserError(
            f"the model's chat template refuses the message: {reason(error)}."
        ) from error


def _split(text: str) -> tuple[str, str]:
    before, mark, after = text.partition(MARK)
    if not mark:
        raise UserError(
            "the model's chat template drops messages, so it cannot be used turn by turn."
        )
    return before, after
