"""Answer HTTP requests: mlx-lm's handler after the checks of `access` and `validation`.

mlx-lm implements OpenAI's protocol. This module adds access control, validation with errors in
OpenAI's format, limits on size and time, and stops generating when the client disconnects.
"""

from __future__ import annotations

import io
import json
import logging
import math
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from mlx_lm.server import APIHandler

from mlx_rgemma.errors import shown
from mlx_rgemma.server.validation import BadRequest, check_request, parse_body

REQUEST_TIMEOUT_S = 60
"""Time for a whole request to arrive, headers and body."""
WRITE_TIMEOUT_S = 60
"""Time for a client to read a piece of its answer."""
LINGER_S = 1.0
"""Time for a refused client to stop sending, so that it receives the error."""
MAX_MESSAGE_CHARS = 400
MAX_LOGGED_CHARS = 300

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
COMPLETION_PATHS = (*CHAT_PATHS, "/v1/completions")
GREETING = {
    "message": "mlx_rgemma serves OpenAI's protocol: set a client's base URL to this address with"
    " /v1. GET /v1/models, POST /v1/chat/completions, POST /v1/completions, GET /health."
}
CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 429: "rate_limit_exceeded"}
# http.server logs client input; terminals would interpret its control characters.
CONTROL_CHARACTERS = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
}


class RequestAborted(RuntimeError):
    """The generator has given up a request and logged the reason."""


class _Failed(BaseException):
    """Carries an error of the generator past mlx-lm's `except Exception`."""

    def __init__(self, error: Exception) -> None:
        broken = isinstance(error, RuntimeError | MemoryError)
        self.status = 503 if broken and not isinstance(error, RecursionError) else 400
        template = type(error).__module__.startswith("jinja2")
        self.message = "the chat template refuses the messages: " if template else ""
        self.message += str(error) or type(error).__name__


class _DisconnectAware:
    """A generator that stops when the client has disconnected."""

    def __init__(self, generator: Any, connection: socket.socket) -> None:
        self.generator = generator
        self.connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            context, responses = self.generator.generate(*args, **kwargs)
        except Exception as error:
            raise _Failed(error) from error
        return context, self._until_disconnected(responses)

    def _until_disconnected(self, responses: Iterator[Any]) -> Iterator[Any]:
        for response in responses:
            if _is_disconnected(self.connection):
                raise ConnectionAbortedError("the client has disconnected")
            yield response


def _is_disconnected(connection: socket.socket) -> bool:
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return True


class _RequestReader(io.RawIOBase):
    """Reads a connection until the time of the whole request is over."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline = time.monotonic() + REQUEST_TIMEOUT_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(APIHandler):
    """mlx-lm's handler after the checks of `access` and `validation`."""

    response_generator: Any
    server: Any
    timeout = WRITE_TIMEOUT_S
    origin: str | None = None
    """Origin of web pages that may read the answer."""
    client: int | None = None
    """Client whose states the request may continue: see `access.Access.client`."""
    streaming = False
    """Whether the headers of a streamed answer have been sent."""
    body_read = False

    def setup(self) -> None:
        """Limit the time of the whole request."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_RequestReader(self.connection))

    def parse_request(self) -> bool:
        """Read the headers of a request, and refuse it if its client has no access."""
        if not super().parse_request():
            return False
        headers, access = self.headers, self.server.access
        hosts, origins = headers.get_all("Host", []), headers.get_all("Origin", [])
        try:
            access.check_host(hosts)
            self.origin = access.check_origin(origins, hosts)
            if self.command != "OPTIONS" and self.path != "/health":
                self.client = access.client(headers.get_all("Authorization", []))
        except BadRequest as error:
            self._refuse(error.status, str(error))
            return False
        return True

    def do_GET(self) -> None:
        """Answer about the server and its model."""
        if self.path == "/":
            self._send(200, GREETING)
        elif self.path == "/health":
            healthy = self.response_generator.is_healthy
            self._send(200 if healthy else 503, {"status": "ok" if healthy else "unavailable"})
        elif self.path == "/v1/models" or self.path.startswith("/v1/models/"):
            self.handle_models_request()
        elif self.path in COMPLETION_PATHS:
            self._refuse(405, f"{self.path} takes POST, not {self.command}")
        else:
            self._refuse(404, f"there is no {shown(self.path)} here")

    def do_HEAD(self) -> None:
        """Answer as to GET, without the body."""
        self.do_GET()

    def do_POST(self) -> None:
        """Answer a completion request."""
        generator = self.response_generator
        provider = generator.model_provider
        try:
            if self.path not in COMPLETION_PATHS:
                known = self.path in ("/", "/health") or self.path.startswith("/v1/models")
                raise BadRequest(
                    f"{self.path} takes GET, not POST"
                    if known
                    else f"there is no {shown(self.path)} here",
                    405 if known else 404,
                )
            body = parse_body(self._read_body())
            check_request(
                body,
                chat=self.path in CHAT_PATHS,
                vocab_size=provider.model.args.vocab_size,
                models=provider.names,
                reserved=provider.reserved_variables,
            )
            if not generator.slots.acquire(blocking=False):
                raise BadRequest("too many requests are being served; try again later", 429)
        except BadRequest as error:
            self._refuse(error.status, str(error))
            return
        generator.threads.add(threading.current_thread())
        try:
            self._answer(body)
        finally:
            generator.slots.release()

    def _answer(self, body: dict[str, Any]) -> None:
        raw, stream = json.dumps(body).encode(), self.rfile
        self.headers.replace_header("Content-Length", str(len(raw)))
        self.rfile = io.BytesIO(raw)
        try:
            super().do_POST()
        except ConnectionError:
            raise
        except _Failed as failure:
            self._refuse(failure.status, failure.message)
        except Exception as error:
            if not isinstance(error, RequestAborted):
                logging.exception("a request failed")
            status = 503 if isinstance(error, RuntimeError) else 500
            if not self.streaming:
                self._headers_buffer: list[bytes] = []  # discard the headers of the failed answer
                self._refuse(status, str(error))
            else:
                event = json.dumps(_error(status, str(error)))
                self.wfile.write(f"data: {event}\n\ndata: [DONE]\n\n".encode())
        finally:
            self.rfile = stream

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Generate until the client disconnects."""
        generator = self.response_generator
        request.client = self.client
        self.response_generator = _DisconnectAware(generator, self.connection)
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
        """Return mlx-lm's answer, with the log-probabilities of the chosen tokens."""
        response = super().generate_response(*args, **kwargs)
        if tokens and token_logprobs:
            names = self.response_generator.model_provider.tokenizer.convert_ids_to_tokens(tokens)
            tops = top_tokens or [()] * len(tokens)
            response["choices"][0]["logprobs"] = {
                "content": [
                    {
                        "id": token,
                        "token": name,
                        "logprob": _finite(logprob),
                        "top_logprobs": [
                            {**other, "logprob": _finite(other["logprob"])}
                            for other in sorted(top, key=lambda other: -other["logprob"])
                        ],
                    }
                    for token, name, logprob, top in zip(
                        tokens, names, token_logprobs, tops, strict=True
                    )
                ]
            }
        return response

    def handle_models_request(self) -> None:
        """List the served model."""
        name = self.response_generator.model_provider.name
        wanted = self.path.removeprefix("/v1/models").removeprefix("/")
        if wanted not in ("", name):
            self._refuse(404, f"model {shown(wanted)} is not served here")
            return
        model = {"id": name, "object": "model", "created": self.created, "owned_by": "mlx_rgemma"}
        self._send(200, model if wanted else {"object": "list", "data": [model]})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in OpenAI's format in place of `http.server`'s HTML."""
        if code == 501:  # a method without a do_... function
            code, message = 405, f"the server takes GET and POST, not {shown(self.command)}"
        self._refuse(code, message or self.responses[code][0])

    def log_message(self, format: str, *args: Any) -> None:
        """Log through `logging`, with control characters escaped."""
        text = (format % args).translate(CONTROL_CHARACTERS)
        if len(text) > MAX_LOGGED_CHARS:
            text = f"{text[:MAX_LOGGED_CHARS]}..."
        logging.info("%s %s", self.address_string(), text)

    def _set_cors_headers(self) -> None:
        if self.origin is None:
            return
        self.send_header("Access-Control-Allow-Origin", self.origin)
        self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
        # The wildcard leaves Authorization out.
        self.send_header("Access-Control-Allow-Headers", "Authorization, *")

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self.streaming = True

    def _read_body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            raise BadRequest("a request needs a Content-Length", 411)
        length, limit = lengths[0], self.server.body_limit
        if len(set(lengths)) > 1:
            raise BadRequest("the request has two different Content-Lengths")
        if not (length.isascii() and length.isdigit()):
            raise BadRequest("Content-Length must be an integer")
        if len(length) > 15 or int(length) > limit:
            raise BadRequest(
                f"a request may have at most {limit} bytes, not {length[:15]};"
                " --max-request-bytes sets the limit",
                413,
            )
        self.body_read = True
        try:
            raw = self.rfile.read(int(length))
        except TimeoutError as error:
            raise BadRequest("the request did not arrive in time", 408) from error
        finally:
            self.connection.settimeout(WRITE_TIMEOUT_S)
        if len(raw) < int(length):
            raise BadRequest(f"the request ends after {len(raw)} of {length} bytes")
        return raw

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, _error(status, message))
        if not self.body_read and self.command not in ("GET", "HEAD", "OPTIONS"):
            self._linger()

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        raw = json.dumps(answer).encode()
        self.connection.settimeout(WRITE_TIMEOUT_S)
        self.close_connection = True
        super()._set_completion_headers(status)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == 405:
            self.send_header("Allow", "GET, HEAD, POST, OPTIONS")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)
            self.wfile.flush()

    def _linger(self) -> None:
        """Read the rest of the request: closing at once would reset the connection."""
        deadline = time.monotonic() + LINGER_S
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    return


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else -9999.0  # as OpenAI writes it: JSON has no -inf


def _error(status: int, message: str) -> dict[str, Any]:
    text = " ".join(message.split())
    if len(text) > MAX_MESSAGE_CHARS:
        text = f"{text[:MAX_MESSAGE_CHARS]}..."
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": CODES.get(status)}}
