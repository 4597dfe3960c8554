"""Sessions: the model state of one text. Feed, fork, save, load and rewind it.

session = Session(*load())
session.feed(open("book.txt"))
session.save("book.safetensors")  # 17 MB for 2B, however long the book
for question in questions:
    print(session.fork().generate(question))
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.generation.decode import CONTEXT_LIMIT, LogitsProcessor, Sampler
from mlx_rgemma.generation.prompts import encode
from mlx_rgemma.generation.response import GenerationResponse, seconds_since, text_responses
from mlx_rgemma.griffin.cache import GriffinCache, state_nbytes
from mlx_rgemma.griffin.checks import refuse_forked_process
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.streams import generation_stream, wired_limit
from mlx_rgemma.sessions.prompt_cache import (
    FINGERPRINT,
    PENDING,
    pending_token,
    read_prompt_cache,
    save_prompt_cache,
)
from mlx_rgemma.sessions.state import TextState
from mlx_rgemma.tokenizers.chunked import ChunkedTokenizer, TextFile

Source = str | Sequence[int] | mx.array | TextFile
TOKENS_SEEN = "tokens_seen"


@dataclass(frozen=True)
class PrefillProgress:
    """Progress of reading a text.

    Attributes:
        tokens: Tokens read.
        seconds: Duration.
    """

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Snapshot:
    """A state of a session, to `rewind` to."""

    model: Model
    state: TextState
    metadata: Mapping[str, str]


class Session:
    """A model, a tokenizer, and the state of one text, of constant size.

    The caches have read every token but the last, which is kept as a number. So generation can
    continue at any token, also after loading a session that was saved in the middle of a sentence.
    After an exception the session is still usable.

    Threads may share a model and a tokenizer's files, each with sessions of its own. A session may
    be passed from thread to thread, but used by one at a time.

    Args:
        model: From `load`.
        tokenizer: From `load`.
        prefill_step_size: Tokens to read at a time.

    Attributes:
        metadata: Strings that are saved with the state.
    """

    def __init__(self, model: Model, tokenizer: Any, *, prefill_step_size: int = 2048) -> None:
        refuse_forked_process()
        # Evaluate now: lazy arrays can only be evaluated on the thread that created them.
        mx.eval(model.parameters())
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_step_size = prefill_step_size
        self.metadata: dict[str, str] = {}
        self._pieces = ChunkedTokenizer(tokenizer)
        self._state = TextState(model.make_cache())

    def __repr__(self) -> str:
        return f"<Session: {self.tokens_seen:,} tokens, {self.nbytes:,} bytes>"

    @property
    def tokens_seen(self) -> int:
        """Tokens read and generated since the text began, including BOS."""
        return self._state.tokens_seen

    @property
    def last_token(self) -> int | None:
        """The last token; None before the first, or if only the state after it is known."""
        return self._state.last_token

    @property
    def nbytes(self) -> int:
        """Bytes of the state; forked sessions share them until one is continued."""
        return state_nbytes(self._state.cache)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text that continues the session, with BOS if it is empty."""
        return [token for tokens in self._tokens(text) for token in tokens]

    def feed(
        self, source: Source, *, progress: Callable[[PrefillProgress], object] | None = None
    ) -> PrefillProgress:
        """Read a text.

        Args:
            source: A text; token ids, used verbatim; or an open text file of any size, which is
                read in pieces. The first text of a session gets BOS, later ones continue it.
            progress: Called after each `prefill_step_size` tokens, and at the end.

        Returns:
            How many tokens were read, and how fast.

        Raises:
            UserError: If a token is unknown, or a file is not UTF-8 text. Everything before it
                has been read.
        """
        started = time.perf_counter()
        before = self.tokens_seen
        for _ in self._read(self._tokens(source)):
            if progress is not None:
                progress(PrefillProgress(self.tokens_seen - before, seconds_since(started)))
        return PrefillProgress(self.tokens_seen - before, seconds_since(started))

    def stream(
        self,
        prompt: Source | None = None,
        max_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        progress: Callable[[PrefillProgress], object] | None = None,
    ) -> Iterator[GenerationResponse]:
        """Read a prompt and generate text, piece by piece.

        Whenever a piece is yielded, the session has seen exactly the tokens up to this piece: it
        may be saved, forked or marked, and the generator closed. The state includes the EOS token,
        as in mlx-lm, and the tokens of a stop text.

        Args:
            prompt: As for `feed`; None to continue from the last token.
            max_tokens: Tokens to generate at most; -1 for no limit.
            stop: Texts that end the generation; they are not part of the output.
            sampler: From log-probabilities (1, vocab_size) to a token (1,); greedy by default.
            logits_processors: As for `stream_generate`; they get the tokens of the prompt and the
                output, `CONTEXT_LIMIT` tokens at most, but no earlier ones.
            progress: As for `feed`.

        Yields:
            A `GenerationResponse`; the last one has a `finish_reason`, "stop" or "length".

        Raises:
            UserError: If the session is empty, `max_tokens` or the prompt is invalid, or the
                session was changed while the generator was paused.
        """
        if max_tokens < 1 and max_tokens != -1:
            raise UserError(f"max_tokens is {max_tokens}, expected at least 1 (or -1: no limit).")
        after = self.last_token if prompt is None else None
        with wired_limit(self.model, generation_stream):
            tic = time.perf_counter()
            recent = [] if self.last_token is None else [self.last_token]
            before = self.tokens_seen
            for chunk in self._read(self._tokens(() if prompt is None else prompt)):
                recent = (recent + chunk)[-CONTEXT_LIMIT:]
                if progress is not None:
                    progress(PrefillProgress(self.tokens_seen - before, seconds_since(tic)))
            read = self.tokens_seen - before
            if self.last_token is None:
                raise UserError("the session is empty: give a prompt.")
            steps = self._state.steps(
                self.model,
                max_tokens,
                sampler=sampler,
                logits_processors=logits_processors,
                recent=recent,
            )
            with closing(steps):
                yield from text_responses(
                    steps,
                    self.tokenizer,
                    max_tokens,
                    stop=stop,
                    prompt_tokens=read,
                    started=tic,
                    after=after,
                )

    def generate(self, prompt: Source | None = None, **kwargs: Any) -> str:
        """Read a prompt and generate text; the arguments are those of `stream`.

        Returns:
            The text without the prompt.
        """
        return "".join(response.text for response in self.stream(prompt, **kwargs))

    def fork(self) -> Session:
        """Return an independent copy; arrays are shared until one of the two is continued."""
        other = copy.copy(self)
        other._state = self._state.copy()
        other.metadata = dict(self.metadata)
        return other

    def mark(self) -> Snapshot:
        """Return a snapshot to `rewind` to, any number of times."""
        return Snapshot(self.model, self._state.copy(), dict(self.metadata))

    def rewind(self, mark: Snapshot) -> None:
        """Restore a snapshot of a session of the same model.

        Raises:
            UserError: If the snapshot belongs to another model.
        """
        if mark.model is not self.model:
            raise UserError("the mark belongs to another model.")
        self._state.restore(mark.state)
        self.metadata = dict(mark.metadata)

    def save(self, path: str | Path) -> None:
        """Save the session as a safetensors file, in mlx-lm's prompt-cache format.

        The file is written atomically. Its header holds the pending token.

        Args:
            path: The file, with any name (mlx-lm needs `.safetensors`); an existing one is
                replaced.

        Raises:
            CheckpointError: If it cannot be written; an existing file is kept.
            UserError: If `metadata` holds anything but strings, or more than 2 MB.
        """
        metadata = {**self.metadata, TOKENS_SEEN: str(self.tokens_seen)}
        if self.last_token is not None:
            metadata[PENDING] = str(self.last_token)
        self._state.evaluate()
        save_prompt_cache(path, self.model, list(self._state.cache), metadata)

    @classmethod
    def load(cls, path: str | Path, model: Model, tokenizer: Any, **options: Any) -> Session:
        """Load a saved session or a prompt cache of mlx-lm.

        Args:
            path: A file of `save`, `save_prompt_cache` or `cache_prompt`.
            model: The model of the state.
            tokenizer: From `load`.
            **options: As for the class itself.

        Raises:
            CheckpointError: If the file is missing, damaged, of another model, or of a batch.
        """
        cache, metadata = read_prompt_cache(path, model)
        if cache[0].batch_size != 1:
            raise CheckpointError(f"{path}: {cache[0].batch_size} sequences; a session has one.")
        session = cls(model, tokenizer, **options)
        session._state = TextState(cache, pending_token(path, model, metadata))
        own = (FINGERPRINT, PENDING, TOKENS_SEEN)
        session.metadata = {k: v for k, v in metadata.items() if k not in own}
        return session

    def prompt_cache(self) -> list[GriffinCache]:
        """Return a copy of the state that has read all tokens, for mlx-lm and `batch_generate`."""
        state = self._state.copy()
        if state.last_token is not None:
            self.model.prefill(mx.array([[state.last_token]]), state.cache)
            state.evaluate()
        return list(state.cache)

    @classmethod
    def from_prompt_cache(
        cls, model: Model, tokenizer: Any, cache: Sequence[GriffinCache], **options: Any
    ) -> Session:
        """Return a session that continues from a copy of a state.

        It has no last token: feed it a text before generating.

        Args:
            model, tokenizer: As for the class itself.
            cache: A state of one sequence, from `prompt_cache` or a batch.
            **options: As for the class itself.

        Raises:
            UserError: If the state belongs to another model, or has several sequences.
        """
        try:
            model.check_cache(cache)
        except ValueError as error:
            raise UserError(str(error)) from error
        if cache[0].batch_size != 1:
            raise UserError(f"the state has {cache[0].batch_size} sequences, expected one.")
        session = cls(model, tokenizer, **options)
        session._state = TextState(cache)
        return session

    def _tokens(self, source: Source) -> Iterable[list[int]]:
        """Yield the checked tokens of a source in lists of bounded length."""
        if isinstance(source, str) or hasattr(source, "read"):
            begin = self.tokens_seen == 0
            pieces: Any = self._pieces.tokens(source, begin=begin, last=self.last_token)
        else:
            values: Any = source.tolist() if isinstance(source, mx.array) else list(source)
            pieces = [values]
        for tokens in pieces:
            if tokens:
                encode(self.tokenizer, tokens, self.model.args.vocab_size)
                yield [int(token) for token in tokens]

    def _read(self, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
        """Read all tokens but the last in chunks; yield the new tokens of each."""
        last = self.last_token
        waiting = [] if last is None else [last]
        yielded = len(waiting)
        for tokens in pieces:
            waiting += tokens
            while len(waiting) > self.prefill_step_size:
                chunk = waiting[: self.prefill_step_size + 1]
                self._state.advance(self.model, chunk)
                yield chunk[yielded:]
                del waiting[: self.prefill_step_size]
                yielded = 1
        if len(waiting) > yielded:
            self._state.advance(self.model, waiting)
            yield waiting[yielded:]
