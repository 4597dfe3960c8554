"""mlx-lm's server around this package's model: what it leaves open is closed here.

mlx-lm batches the requests and keeps states for later turns. Added are one served model instead of
whatever a request names, states that are reused only where a token is left to read, and a thread
that survives an error; `http_handler` is what clients meet.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
import weakref
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server as mlx_lm_server
from mlx_lm.models.cache import LRUPromptCache

from mlx_rgemma import distributed
from mlx_rgemma.checkpoints import load
from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.device import settle
from mlx_rgemma.generation.single import stream_generate
from mlx_rgemma.generation.speculation import check_vocabulary
from mlx_rgemma.griffin.cache import state_nbytes
from mlx_rgemma.serving.http_handler import Handler, Server
from mlx_rgemma.serving.request_checks import DEFAULT_MODEL

STOP = "stop"
"""What processes that share a model are sent in place of a request, in the end."""

EMBEDDED_NAME = "embedded"
"""What the embedded model is called in requests."""


class Provider(mlx_lm_server.ModelProvider):
    """Loads the one model that is served, with this package's loader."""

    model_key: Any
    model: Any
    draft_model: Any

    @property
    def name(self) -> str:
        return self.cli_args.model or EMBEDDED_NAME

    @property
    def names(self) -> frozenset[str]:
        """What requests may call it."""
        path = Path(self.name)
        where = {str(path.resolve())} if path.exists() else set()
        return frozenset({DEFAULT_MODEL, self.name} | where)

    def load_default(self) -> None:
        self.load(DEFAULT_MODEL, None, DEFAULT_MODEL)

    def _load(
        self, model_path: Any, adapter_path: Any = None, draft_model_path: Any = None
    ) -> None:
        args = self.cli_args
        group = distributed.group()
        model, tokenizer = load(
            model_path, dtype=args.dtype, adapter_path=adapter_path, group=group
        )
        draft_model = None
        if draft_model_path is not None:
            draft_model, draft_tokenizer = load(draft_model_path, dtype=args.dtype)
            check_vocabulary(model, draft_model, tokenizer, draft_tokenizer)
        if args.chat_template:
            tokenizer.chat_template = args.chat_template
            tokenizer.has_chat_template = True
        elif args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        self.model_key = (model_path, adapter_path, draft_model_path)
        self.model, self.tokenizer, self.draft_model = model, tokenizer, draft_model
        self.processor = None
        self.is_batchable = draft_model is None

    @property
    def state_bytes(self) -> int:
        """Bytes of one conversation's state."""
        models = [self.model] if self.draft_model is None else [self.model, self.draft_model]
        return sum(state_nbytes(model.make_cache()) for model in models)


class States(LRUPromptCache):
    """States of conversations, the least recently used ones dropped first."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """The state of the longest known beginning; a token is always left to read."""
        if len(tokens) < 2:
            return None, tokens
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, [*rest, tokens[-1]]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
    ) -> None:
        """Keep a state, as numbers of its own and not as a part of a batch's."""
        mx.eval([layer.state for layer in prompt_cache])
        super().insert_cache(model, tokens, prompt_cache, **kwargs)


class Generator(mlx_lm_server.ResponseGenerator):
    """The thread that generates; an error ends the requests at hand, not the thread."""

    model_provider: Any

    def __init__(self, provider: Provider, states: States, max_requests: int) -> None:
        self.slots = threading.BoundedSemaphore(max_requests)
        self.ready = threading.Event()
        self.failure: Exception | None = None
        self.stopping = False
        self._at_hand: weakref.WeakSet[Any] = weakref.WeakSet()
        super().__init__(provider, states)

    def _run_generate(self) -> None:
        try:
            self.model_provider.load_default()
        except Exception as error:  # told by `wait`
            self.failure = error
            self._generation_failed = True
            self.ready.set()
            return
        self.ready.set()
        while not self._stop:
            try:
                self._generate()
            except Exception:
                logging.exception("the batch was given up after an error")
                if self._is_distributed:
                    distributed.abandon("failed while it served")
                for answers in list(self._at_hand):
                    answers.put(RuntimeError("the batch was given up after an error; try again"))

    def wait(self) -> None:
        """Wait until the model is there.

        Raises:
            Exception: Whatever kept it from being loaded.
        """
        self.ready.wait()
        if self.failure is not None:
            raise self.failure

    def stop_and_join(self) -> None:
        """Stop; where several processes share the model, all of them."""
        self.stopping = True
        self._stop = not self._is_distributed
        self.join()

    def _share_request(self, request: Any) -> Any:
        if self.stopping and self._rank == 0:
            request = (queue.Queue(), STOP)
        request = super()._share_request(request)
        if request is not None and request[1] == STOP:
            self._stop = True
            return None
        return request

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        if request is not None:
            self._at_hand.add(request[0])
        return request

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        answer = super()._tokenize(tokenizer, request, args)
        tokens, known = answer[0], self.model_provider.model.args.vocab_size
        if not tokens or max(tokens) >= known:
            raise ValueError(
                f"the prompt holds token {max(tokens)}; the model knows 0 to {known - 1}"
                if tokens
                else "the prompt is empty"
            )
        return answer

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> Any:
        """As mlx-lm's, with the one model there is, whatever name the request has for it."""
        adapter: Any = None
        generation_args.model = mlx_lm_server.ModelDescription(
            DEFAULT_MODEL, DEFAULT_MODEL, adapter
        )
        context, answers = super().generate(request, generation_args, progress_callback)
        if self._is_distributed and not self._is_batchable(generation_args):
            # The other processes cannot be told in the middle: the answer is written to its end.
            context.stop = lambda: None
        return context, answers


def serve(args: Namespace) -> None:
    """Serve until interrupted; under `mlx.launch`, the first process serves for all.

    Args:
        args: The arguments of the command, which mlx-lm's server reads too.

    Raises:
        UserError: If the model cannot be loaded or the address not be used.
    """
    distributed.join()
    first = distributed.rank() == 0
    logging.basicConfig(
        level=args.log_level if first else "ERROR",
        format="%(asctime)s - %(levelname)s - %(message)s",
        force=True,
    )
    # Requests that are served one by one speculate with this package's loop.
    mlx_lm_server.stream_generate = _stream_generate  # type: ignore[assignment]
    if distributed.group() is not None:
        make_sampler = mlx_lm_server._make_sampler
        mlx_lm_server._make_sampler = lambda *a: distributed.agreed(make_sampler(*a))
    provider = Provider(args)
    limit = 1 << 63 if args.prompt_cache_bytes is None else args.prompt_cache_bytes
    states = States(args.prompt_cache_size, limit)
    if not first:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends it for all
        generator = Generator(provider, states, args.max_requests)
        generator.wait()
        return generator.join()
    fingerprint = mlx_lm_server.get_system_fingerprint()
    try:
        server = Server(
            (args.host, args.port),
            lambda *a, **k: Handler(generator, *a, system_fingerprint=fingerprint, **k),
        )
    except OSError as error:
        raise UserError(f"cannot listen on {args.host}:{args.port}: {error.strerror}.") from error
    with server:
        generator = Generator(provider, states, args.max_requests)
        try:
            generator.wait()
            each = provider.state_bytes
            kept = min(args.prompt_cache_size, limit // each)
            print(
                f"Model: {provider.name}\n"
                f"State: {each} bytes a conversation, at any length; {kept} kept for later turns,"
                f" {kept * each / 1e6:.1f} MB\n"
                f"Serving at http://{args.host}:{server.server_port}/v1",
                flush=True,
            )
            server.serve_forever()
        except KeyboardInterrupt:
            if distributed.group() is None:
                raise
        finally:
            generator.stop_and_join()


def _stream_generate(
    *, model: Any, tokenizer: Any, prompt: list[int], draft_model: Any, **kwargs: Any
) -> Iterator[Any]:
    """mlx-lm's `stream_generate`, with what RecurrentGemma needs of its arguments."""
    options = {key: kwargs[key] for key in _OPTIONS}
    if draft_model is not None:
        options |= {"draft_model": draft_model, "num_draft_tokens": kwargs["num_draft_tokens"]}
    try:
        responses: Any = stream_generate(model, tokenizer, prompt, **options)
        with closing(responses):
            yield from responses
    finally:
        if distributed.group() is not None:
            settle()


_OPTIONS = (
    "max_tokens",
    "sampler",
    "logits_processors",
    "prompt_cache",
    "prompt_progress_callback",
    "prefill_step_size",
)
