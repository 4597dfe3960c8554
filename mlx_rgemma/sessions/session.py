"""A text that a model is reading, as something to hold: feed it, fork it, save it, go back in it.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.generation.decode import CONTEXT_LIMIT, LogitsProcessor, Processors, Sampler
from mlx_rgemma.generation.prompts import encode
from mlx_rgemma.generation.response import GenerationResponse, seconds_since, text_responses
from mlx_rgemma.griffin.cache import GriffinCache, state_nbytes
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.griffin.process import refuse_forked_process
from mlx_rgemma.ops.streams import wired_limit
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
    """How far a text has been read.

    Attributes:
        tokens: Tokens read.
        seconds: How long that took.
    """

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Snapshot:
    """A place in a session that `rewind` goes back to; it holds one state."""

    model: Model
    state: TextState
    metadata: Mapping[str, str]


class Session:
    """A model, a tokenizer, and the state of one text, of a size that never changes.

    The caches have read every token but the last, which is kept as a number: a session can then
    go on writing at any moment, also one that was saved in the middle of a sentence. What is done
    to a session is done whole or not at all; an exception in between leaves a state that can be
    used.

    Several threads may share a model and a tokenizer's files, each with sessions of its own; a
    session may be handed from thread to thread, but be used by one at a time.

    Args:
        model: From `load`.
        tokenizer: From `load`.
        prefill_step_size: Tokens to read at a time.

    Attributes:
        metadata: Texts that are saved with the state.
    """

    def __init__(self, model: Model, tokenizer: Any, *, prefill_step_size: int = 2048) -> None:
        refuse_forked_process()
        # What is left to compute could only be computed by the thread that made it.
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
        """Tokens read and written since the text began, BOS among them."""
        return self._state.tokens_seen

    @property
    def last_token(self) -> int | None:
        """The last token; None where there is none, or only the state it led to is known."""
        return self._state.last_token

    @property
    def nbytes(self) -> int:
        """Bytes of the state; sessions that were forked share them until one of them goes on."""
        return state_nbytes(self._state.cache)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that goes on from here; with BOS where nothing came before."""
        return [token for tokens in self._tokens(text) for token in tokens]

    def feed(
        self, source: Source, *, progress: Callable[[PrefillProgress], object] | None = None
    ) -> PrefillProgress:
        """Read a text.

        Args:
            source: A text; token ids, taken as they are; or an open text file of any size, which
                is read in pieces. The first text of a session gets BOS, later ones go on where
                it ended.
            progress: Called after each `prefill_step_size` tokens, and at the end.

        Returns:
            How many tokens were read, and how fast.

        Raises:
            UserError: If a token is unknown, or a file holds no UTF-8 text. What came before it
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
        """Read a prompt and write on, piece by piece.

        Whenever a piece has been handed out, the session has seen the tokens up to this piece and
        no more: it may be saved, forked or marked then, and the stream be left. The token that
        ends a text is part of the state, as in mlx-lm; so are the tokens of a stop text.

        Args:
            prompt: As for `feed`; None to go on from the last token.
            max_tokens: How many tokens to write at most; -1 for no limit.
            stop: Texts that end the generation; they are not part of the output.
            sampler: From log-probabilities (1, vocab_size) to a token (1,); greedy by default.
            logits_processors: As for `stream_generate`; they see the prompt and what was written
                since, `CONTEXT_LIMIT` tokens at most, not what was read before.
            progress: As for `feed`.

        Yields:
            A `GenerationResponse`; the last one has a `finish_reason`, "stop" or "length".

        Raises:
            UserError: If there is nothing to go on from, `max_tokens` is no count, the prompt
                cannot be read, or the session was changed while the stream was paused.
        """
        if max_tokens < 1 and max_tokens != -1:
            raise UserError(f"max_tokens is {max_tokens}, expected at least 1 (or -1: no limit).")
        after = self.last_token if prompt is None else None
        with wired_limit(self.model, mx.default_stream(mx.default_device())):
            tic = time.perf_counter()
            recent = [] if self.last_token is None else [self.last_token]
            before = self.tokens_seen
            for chunk in self._read(self._tokens(() if prompt is None else prompt)):
                recent = (recent + chunk)[-CONTEXT_LIMIT:]
                if progress is not None:
                    progress(PrefillProgress(self.tokens_seen - before, seconds_since(tic)))
            read = self.tokens_seen - before
            if self.last_token is None:
                raise UserError("there is nothing to go on from: give a prompt.")
            processors = Processors(logits_processors, recent)
            steps = self._state.steps(self.model, max_tokens, sampler, processors)
            yield from text_responses(
                ((token, logprobs, False) for token, logprobs in steps),
                self.tokenizer,
                max_tokens,
                stop=stop,
                prompt_tokens=read,
                started=tic,
                after=after,
            )

    def generate(self, prompt: Source | None = None, **kwargs: Any) -> str:
        """Read a prompt and write on; the arguments are those of `stream`.

        Returns:
            The text without the prompt.
        """
        return "".join(response.text for response in self.stream(prompt, **kwargs))

    def fork(self) -> Session:
        """A session that goes on from here by itself; arrays are shared until one of them does."""
        other = copy.copy(self)
        other._state = self._state.copy()
        other.metadata = dict(self.metadata)
        return other

    def mark(self) -> Snapshot:
        """A place to `rewind` to, any number of times."""
        return Snapshot(self.model, self._state.copy(), dict(self.metadata))

    def rewind(self, mark: Snapshot) -> None:
        """Go back (or over) to a place that was marked in a session of the same model.

        Raises:
            UserError: If the mark is another model's.
        """
        if mark.model is not self.model:
            raise UserError("the mark was made with another model.")
        self._state.restore(mark.state)
        self.metadata = dict(mark.metadata)

    def save(self, path: str | Path) -> None:
        """Save the session as a safetensors file, in mlx-lm's prompt-cache format.

        The file appears whole or not at all. Its header says which token is still to be read.

        Args:
            path: The file, of any name (`load` does not look at it; mlx-lm needs `.safetensors`);
                one that exists is replaced.

        Raises:
            CheckpointError: If it cannot be written; a file that was there stays.
            UserError: If `metadata` holds anything but texts, or 2 MB of them.
        """
        metadata = {**self.metadata, TOKENS_SEEN: str(self.tokens_seen)}
        if self.last_token is not None:
            metadata[PENDING] = str(self.last_token)
        self._state.evaluate()
        save_prompt_cache(path, self.model, list(self._state.cache), metadata)

    @classmethod
    def load(cls, path: str | Path, model: Model, tokenizer: Any, **options: Any) -> Session:
        """A session that was saved, or a prompt cache of mlx-lm's.

        Args:
            path: What `save`, `save_prompt_cache` or `cache_prompt` wrote.
            model: The model that made it.
            tokenizer: From `load`.
            **options: As for the class itself.

        Raises:
            CheckpointError: If the file is missing, damaged, of another model, or of a batch.
        """
        cache, metadata = read_prompt_cache(path, model)
        if cache[0].batch_size != 1:
            raise CheckpointError(f"{path}: {cache[0].batch_size} sequences; a session is of one.")
        session = cls(model, tokenizer, **options)
        session._state = TextState(cache, pending_token(path, model, metadata))
        own = (FINGERPRINT, PENDING, TOKENS_SEEN)
        session.metadata = {k: v for k, v in metadata.items() if k not in own}
        return session

    def prompt_cache(self) -> list[GriffinCache]:
        """A copy of the state for mlx-lm's functions and `batch_generate`: all tokens are read."""
        state = self._state.copy()
        if state.last_token is not None:
            self.model.prefill(mx.array([[state.last_token]]), state.cache)
            state.evaluate()
        return list(state.cache)

    @classmethod
    def from_prompt_cache(
        cls, model: Model, tokenizer: Any, cache: Sequence[GriffinCache], **options: Any
    ) -> Session:
        """A session that goes on from a state, which stays as it is.

        It has no last token: feed it something before it can write.

        Args:
            model, tokenizer: As for the class itself.
            cache: A state of one sequence, from `prompt_cache` or a batch.
            **options: As for the class itself.

        Raises:
            UserError: If the state is another model's, or of several sequences.
        """
        try:
            model.check_cache(cache)
        except ValueError as error:
            raise UserError(str(error)) from error
        if cache[0].batch_size != 1:
            raise UserError(f"the state is of {cache[0].batch_size} sequences, expected one.")
        session = cls(model, tokenizer, **options)
        session._state = TextState(cache)
        return session

    def _tokens(self, source: Source) -> Iterable[list[int]]:
        """The tokens of a source, in lists of bounded length, each of them checked."""
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
        """Read tokens, all but the last, in chunks; yields the tokens of each, as new tokens."""
        last = self.last_token
        waiting = [] if last is None else [last]
        told = len(waiting)
        for tokens in pieces:
            waiting += tokens
            while len(waiting) > self.prefill_step_size:
                chunk = waiting[: self.prefill_step_size + 1]
                self._state.advance(self.model, chunk)
                yield chunk[told:]
                del waiting[: self.prefill_step_size]
                told = 1
        if len(waiting) > told:
            self._state.advance(self.model, waiting)
            yield waiting[told:]
