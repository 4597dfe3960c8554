"""Accept connections: one thread for each, up to a limit."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_rgemma.server.access import Access, is_loopback

BODY_LIMIT = 2 * 10**6
"""Default of `--max-request-bytes`: a prompt of about 500,000 tokens."""
MAX_CONNECTIONS = 1024
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


class Server(ThreadingHTTPServer):
    """Serve each connection in a thread; a broken connection is not an error of the server.

    Args:
        address: Host and port to listen on.
        handler: Creates the handler of a connection.
        origins: See `Access`.
        keys: See `Access`.
        body_limit: Bytes per request at most.

    Raises:
        OSError: If the address cannot be used.
    """

    request_queue_size = 256
    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        handler: Callable[..., Any],
        *,
        origins: Sequence[str] = (),
        keys: Sequence[str] = (),
        body_limit: int = BODY_LIMIT,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)
        self.body_limit = body_limit
        self.access = Access(
            host=address[0],
            loopback=is_loopback(str(self.server_address[0])),
            origins=frozenset(origin.strip().lower().rstrip("/") for origin in origins),
            keys=keys,
        )
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    @property
    def url(self) -> str:
        host = self.access.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or close it if there are too many."""
        if not self._places.acquire(blocking=False):
            with request:
                request.setblocking(False)
                request.send(BUSY)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of a connection."""
        logging.info("a connection of %s broke off", client_address, exc_info=True)
