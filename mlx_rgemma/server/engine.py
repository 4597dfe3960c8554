"""Run mlx-lm's server with this package's model.

mlx-lm batches the requests and keeps states for later turns. This module adds: one served model,
whatever a request names; states that belong to one client each and are reused only if a token is
left to read; a generation thread that survives errors. `handler` answers the clients.
"""

from __future__ import annotations

import inspect
import logging
import queue
import signal
import sys
import threading
import time
import weakref
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from mlx_lm import server as mlx_lm_server

from mlx_rgemma import distributed
from mlx_rgemma.checkpoints.load import load
from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.api import stream_generate
from mlx_rgemma.generation.speculative import check_vocabulary
from mlx_rgemma.griffin.cache import state_nbytes
from mlx_rgemma.ops.streams import synchronize_streams
from mlx_rgemma.server.access import KEYS_VARIABLE, Access, api_keys
from mlx_rgemma.server.handler import Handler, RequestAborted
from mlx_rgemma.server.http_server import Server
from mlx_rgemma.server.mlx_lm_api import check_mlx_lm
from mlx_rgemma.server.states import Prompt, PromptCacheStore
from mlx_rgemma.server.validation import DEFAULT_MODEL

STOP = "stop"
"""Sent to the other ranks in place of a request, to stop them."""

EMBEDDED_NAME = "embedded"
"""The embedded model's name in requests."""

MAX_STATE_MACHINES = 8
"""Automata of stop strings to keep: requests choose the strings, so mlx-lm's 101 are too many."""

THREAD_EXIT_S = 0.25
"""Time for the generation thread to end after it has been joined.

MLX then destroys functions compiled in that thread, which needs the interpreter. If Python were
already exiting, the process would abort.
"""

FINISH_S = 2.0
"""Time for open requests to receive the error that the server stops."""


class Provider(mlx_lm_server.ModelProvider):
    """Loads the served model with this package's loader."""

    model_key: Any
    model: Any
    draft_model: Any
    reserved_variables: frozenset[str] = frozenset()
    """Parameters of the tokenizer, which are not variables of its chat template."""

    @property
    def name(self) -> str:
        return self.cli_args.model or EMBEDDED_NAME

    @property
    def names(self) -> frozenset[str]:
        """Names of the model in requests."""
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
        self.reserved_variables = _parameters(tokenizer)
        if self.cli_args.top_k >= model.args.vocab_size:
            self.cli_args.top_k = 0  # all tokens

    @property
    def state_bytes(self) -> int:
        """Bytes of one conversation's state."""
        models = [self.model] if self.draft_model is None else [self.model, self.draft_model]
        return sum(state_nbytes(model.make_cache()) for model in models)


def _parameters(tokenizer: Any) -> frozenset[str]:
    """Return the names that are not passed to the chat template.

    These are the parameters of `apply_chat_template` and the tokenizer's call, and special tokens.
    """
    tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)
    kind: Any = type(tokenizer)  # the method of the instance may be wrapped
    functions = [getattr(kind, "apply_chat_template", None), kind.__call__]
    names = [
        name
        for function in functions
        if function
        for name in inspect.signature(function).parameters
    ]
    return frozenset([*names, *getattr(tokenizer, "special_tokens_map", ())])


class Generator(mlx_lm_server.ResponseGenerator):
    """The generation thread; an error ends the current requests, not the thread."""

    model_provider: Any

    def __init__(self, provider: Provider, states: PromptCacheStore, max_requests: int) -> None:
        self.slots = threading.BoundedSemaphore(max_requests)
        self.threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # that hold a slot
        self.ready = threading.Event()
        self.failure: Exception | None = None
        self.stopping = False
        self._current: weakref.WeakSet[Any] = weakref.WeakSet()
        super().__init__(provider, states)

    def _run_generate(self) -> None:
        try:
            self.model_provider.load_default()
        except Exception as error:  # raised by `wait`
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
                self._fail_requests("the batch was given up after an error; try again")

    def _fail_requests(self, reason: str) -> None:
        for answers in list(self._current):
            answers.put(RequestAborted(reason))

    def wait(self) -> None:
        """Wait until the model is loaded.

        Raises:
            Exception: The error of loading it.
        """
        self.ready.wait()
        if self.failure is not None:
            raise self.failure

    def stop_and_join(self) -> None:
        """Stop on all ranks, and end the open requests."""
        self.stopping = True
        self._stop = not self._is_distributed
        self.join()
        with suppress(queue.Empty):
            while True:
                self._current.add(self.requests.get_nowait()[0])
        self._fail_requests("the server is shutting down")
        deadline = time.monotonic() + FINISH_S
        for thread in list(self.threads):  # Python must not exit before them
            thread.join(max(0.0, deadline - time.monotonic()))
        time.sleep(THREAD_EXIT_S)

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
            self._current.add(request[0])
        return request

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        tokens, *rest = super()._tokenize(tokenizer, request, args)
        known = self.model_provider.model.args.vocab_size
        if not tokens or max(tokens) >= known:
            raise ValueError(
                f"the prompt holds token {max(tokens)}; the model knows 0 to {known - 1}"
                if tokens
                else "the prompt is empty"
            )
        return Prompt(tokens, getattr(request, "client", None)), *rest

    def _make_state_machine(self, model_key: Any, tokenizer: Any, stop_words: list[str]) -> Any:
        if len(self._state_machine_cache) >= MAX_STATE_MACHINES:
            self._state_machine_cache.clear()
        return super()._make_state_machine(model_key, tokenizer, stop_words)

    def _log_cache_stats(self) -> None:
        states, megabytes = len(self.prompt_cache), self.prompt_cache.nbytes / 1e6
        logging.info("Prompt cache: %d states, %.1f MB", states, megabytes)

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> Any:
        """Generate with the served model, whatever name the request uses."""
        adapter: Any = None
        generation_args.model = mlx_lm_server.ModelDescription(
            DEFAULT_MODEL, DEFAULT_MODEL, adapter
        )
        context, answers = super().generate(request, generation_args, progress_callback)
        if self._is_distributed and not self._is_batchable(generation_args):
            # The other ranks cannot be interrupted: the answer is generated to its end.
            context.stop = lambda: None
        return context, answers


def serve(args: Namespace) -> None:
    """Serve until interrupted; under `mlx.launch`, rank 0 serves.

    Args:
        args: The arguments of the command, which mlx-lm's server reads as well.

    Raises:
        UserError: If the model cannot be loaded, the address cannot be used, or mlx-lm has changed.
    """
    check_mlx_lm()
    keys = api_keys(args.api_key)
    distributed.join()
    main = distributed.rank() == 0
    logging.basicConfig(
        level=args.log_level if main else "ERROR",
        format="%(asctime)s - %(levelname)s - %(message)s",
        force=True,
    )
    # Requests with a draft model are served one by one, with this package's decode loop.
    mlx_lm_server.stream_generate = _stream_generate  # type: ignore[assignment]
    if distributed.group() is not None:
        make_sampler = mlx_lm_server._make_sampler
        mlx_lm_server._make_sampler = lambda *a: distributed.synchronized_sampler(make_sampler(*a))
    provider = Provider(args)
    limit = 1 << 63 if args.prompt_cache_bytes is None else args.prompt_cache_bytes
    states = PromptCacheStore(args.prompt_cache_size, limit)
    if not main:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends all ranks
        generator = Generator(provider, states, args.max_requests)
        generator.wait()
        return generator.join()
    fingerprint = mlx_lm_server.get_system_fingerprint()
    try:
        server = Server(
            (args.host, args.port),
            lambda *a, **k: Handler(generator, *a, system_fingerprint=fingerprint, **k),
            origins=args.allowed_origins,
            keys=keys,
            body_limit=args.max_request_bytes,
        )
    except OSError as error:
        raise UserError(f"cannot listen on {args.host}:{args.port}: {error.strerror}.") from error
    with server:
        generator = Generator(provider, states, args.max_requests)
        try:
            generator.wait()
            _end_on_signals()
            each = provider.state_bytes
            kept = min(args.prompt_cache_size, limit // each)
            if not keys and not server.access.loopback:
                kept = 0  # requests have no client
            print(
                f"Model: {provider.name}\n"
                f"State: {each} bytes per conversation, at any length; {kept} kept for later turns,"
                f" {kept * each / 1e6:.1f} MB\n"
                f"Serving at {server.url}/v1",
                flush=True,
            )
            _warn(server.access, server.url)
            server.serve_forever()
        except _Ended:
            pass
        except KeyboardInterrupt:
            if distributed.group() is None:
                raise
        finally:
            generator.stop_and_join()


class _Ended(Exception):
    """Raised by a signal that ends the server."""


def _end_on_signals() -> None:
    """Shut down on SIGTERM and SIGHUP, and exit at once on a second one."""

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Ended

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not ignored, as under nohup
            signal.signal(number, end)


def _warn(access: Access, url: str) -> None:
    """Warn on stderr if other machines can reach the server."""
    if access.loopback:
        return
    if access.keys:
        warning = "the connection is not encrypted, API keys included"
    else:
        warning = (
            "anybody who can reach this address may use the server, as it has no API key"
            f" (--api-key or {KEYS_VARIABLE}); no states are kept for later turns"
        )
    print(f"warning: {url} is open to other machines: {warning}.", file=sys.stderr, flush=True)


def _stream_generate(
    *, model: Any, tokenizer: Any, prompt: list[int], draft_model: Any, **kwargs: Any
) -> Iterator[Any]:
    """Call this package's `stream_generate` with the arguments of mlx-lm's."""
    options = {key: kwargs[key] for key in _OPTIONS}
    if draft_model is not None:
        options |= {"draft_model": draft_model, "num_draft_tokens": kwargs["num_draft_tokens"]}
    try:
        responses: Any = stream_generate(model, tokenizer, prompt, **options)
        with closing(responses):
            yield from responses
    finally:
        if distributed.group() is not None:
            synchronize_streams()


_OPTIONS = (
    "max_tokens",
    "sampler",
    "logits_processors",
    "prompt_cache",
    "prompt_progress_callback",
    "prefill_step_size",
)
