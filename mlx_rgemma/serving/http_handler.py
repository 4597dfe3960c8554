"""What clients of the server meet: mlx-lm's handler behind the checks of `request_checks`.

mlx-lm speaks OpenAI's protocol. Added are clear answers to bad requests, before anything is done,
and that a client that leaves frees its place.
"""

from __future__ import annotations

import io
import json
import logging
import select
import socket
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm.server import APIHandler

from mlx_rgemma.serving.request_checks import BadRequest, check_request, parse_body

BODY_LIMIT = 64 * 2**20
"""Bytes of a request."""
CLIENT_TIMEOUT_S = 60
"""How long a client may take to send its request, or to read a piece of its answer."""


class _Watched:
    """A generator that stops for a client that has left."""

    def __init__(self, generator: Any, connection: socket.socket) -> None:
        self.generator = generator
        self.connection = connection
        self.failed_status = 400

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            context, responses = self.generator.generate(*args, **kwargs)
        except RuntimeError:
            self.failed_status = 503
            raise
        return context, self._until_left(responses)

    def _until_left(self, responses: Iterator[Any]) -> Iterator[Any]:
        for response in responses:
            if _has_left(self.connection):
                raise ConnectionAbortedError("the client has left")
            yield response


def _has_left(connection: socket.socket) -> bool:
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return True


class Handler(APIHandler):
    """mlx-lm's handler behind the checks of `request_checks`."""

    response_generator: Any
    timeout = CLIENT_TIMEOUT_S
    answering = False
    """Whether the request has been taken, so that errors are answers about it."""

    def do_POST(self) -> None:
        """Answer a completion request."""
        generator = self.response_generator
        try:
            chat = self.path in ("/v1/chat/completions", "/chat/completions")
            if not chat and self.path != "/v1/completions":
                raise BadRequest(f"there is no {self.path[:80]} here", 404)
            body = parse_body(self._read_body())
            vocab_size = generator.model_provider.model.args.vocab_size
            names = generator.model_provider.names
            check_request(body, chat=chat, vocab_size=vocab_size, models=names)
            if not generator.slots.acquire(blocking=False):
                raise BadRequest("too many requests are being served; try again later", 429)
        except BadRequest as error:
            self._refuse(error.status, str(error))
            return
        try:
            self._answer(body)
        finally:
            generator.slots.release()

    def _answer(self, body: dict[str, Any]) -> None:
        raw, stream = json.dumps(body).encode(), self.rfile
        self.headers.replace_header("Content-Length", str(len(raw)))
        self.rfile, self.answering = io.BytesIO(raw), True
        try:
            super().do_POST()
        except ConnectionError:
            raise
        except Exception as error:
            logging.exception("a request failed")
            if not self.stream:
                self._headers_buffer: list[bytes] = []  # of an answer that will not come
                self._refuse(500, str(error))
            else:
                self.wfile.write(f"data: {json.dumps(_error(500, str(error)))}\n\n".encode())
        finally:
            self.rfile, self.answering = stream, False

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Generate, as long as the client is there."""
        generator = self.response_generator
        self.response_generator = self._watched = _Watched(generator, self.connection)
        try:
            super().handle_completion(request, stop_words)
        finally:
            self.response_generator = generator

    def generate_response(
        self,
        *args: Any,
        tokens: list[int] | None = None,
        token_logprobs: list[float] | None = None,
        top_tokens: list[Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """mlx-lm's answer, whose log-probabilities are those of the tokens that were chosen."""
        response = super().generate_response(*args, **kwargs)
        if tokens and token_logprobs:
            names = self.response_generator.model_provider.tokenizer.convert_ids_to_tokens(tokens)
            tops = top_tokens or [()] * len(tokens)
            response["choices"][0]["logprobs"] = {
                "content": [
                    {
                        "id": token,
                        "token": name,
                        "logprob": logprob,
                        "top_logprobs": sorted(top, key=lambda other: -other["logprob"]),
                    }
                    for token, name, logprob, top in zip(
                        tokens, names, token_logprobs, tops, strict=True
                    )
                ]
            }
        return response

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if self.answering and status_code == 404:  # mlx-lm's answer to whatever goes wrong
            status_code = self._watched.failed_status
        super()._set_completion_headers(status_code)

    def handle_models_request(self) -> None:
        """List the model that is served."""
        name = self.response_generator.model_provider.name
        wanted = self.path.split("/", 3)[3:]
        if wanted and wanted[0] not in ("", name):
            self._refuse(404, f"model {wanted[0]!r} is not served here")
            return
        model = {"id": name, "object": "model", "created": self.created, "owned_by": "mlx_rgemma"}
        self._send(200, model if wanted and wanted[0] else {"object": "list", "data": [model]})

    def log_message(self, format: str, *args: Any) -> None:
        """Log through `logging`, like everything else."""
        logging.info("%s %s", self.address_string(), format % args)

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            raise BadRequest("a request needs a Content-Length", 411)
        length = self.headers.get("Content-Length")
        if length is None:
            raise BadRequest("a request needs a Content-Length", 411)
        if not (length.isascii() and length.isdigit()):
            raise BadRequest("Content-Length must be a whole number")
        if len(length) > 12 or int(length) > BODY_LIMIT:
            raise BadRequest(f"a request has at most {BODY_LIMIT} bytes", 413)
        try:
            raw = self.rfile.read(int(length))
        except TimeoutError as error:
            raise BadRequest("the request did not arrive in time", 408) from error
        if len(raw) < int(length):
            raise BadRequest(f"the request ends after {len(raw)} of {length} bytes")
        return raw

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, _error(status, message))

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        raw = json.dumps(answer).encode()
        super()._set_completion_headers(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


class Server(ThreadingHTTPServer):
    """One thread a connection; one that breaks off is no error of the server's."""

    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of errors in the log."""
        logging.info("a connection of %s broke off", client_address, exc_info=True)
