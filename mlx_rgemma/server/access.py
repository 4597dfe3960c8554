"""Access control: by the Host and Origin headers and by API keys.

A web page may send requests to a server on the user's own machine. Its browser says where the page
comes from (Origin) and which server it addresses (Host). Both are checked first, so that a foreign
page can neither use the server nor pose as a local one by DNS rebinding.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.server.validation import BadRequest

KEYS_VARIABLE = "MLX_RGEMMA_API_KEY"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
ANY_CLIENT = -1
"""The client of every request to a server without keys that only this machine can reach."""


@dataclass(frozen=True)
class Access:
    """The rules of one server.

    Args:
        host: The value of `--host`.
        loopback: Whether only this machine can reach the address.
        origins: Origins of web pages that may use the server, besides its own and those of this
            machine; `*` for all.
        keys: API keys, one of which a request must carry; empty for none.
    """

    host: str
    loopback: bool
    origins: frozenset[str] = frozenset()
    keys: Sequence[str] = field(default=(), repr=False)

    def check_host(self, hosts: Sequence[str]) -> None:
        """Refuse a Host header of another machine if only this one can reach the server.

        Any port is accepted, because it may be forwarded.

        Raises:
            BadRequest: With status 403.
        """
        if self.loopback and not all(self._is_own_name(_host_name(host)) for host in hosts):
            raise BadRequest(
                f"the Host header must name this machine (localhost), not {shown(hosts[0])}", 403
            )

    def check_origin(self, origins: Sequence[str], hosts: Sequence[str]) -> str | None:
        """Refuse requests of foreign web pages.

        Returns:
            The origin that may read the answer, `*` for all; None if the request has no origin.

        Raises:
            BadRequest: With status 403.
        """
        for origin in origins:
            if not (self.origins & {"*", origin.lower()} or self._is_own_origin(origin, hosts)):
                raise BadRequest(
                    f"web pages of {shown(origin)} may not use this server;"
                    " --allowed-origins names those that may",
                    403,
                )
        return "*" if "*" in self.origins else next(iter(origins), None)

    def client(self, authorizations: Sequence[str]) -> int | None:
        """Return the client of a request; clients do not share states.

        Returns:
            The index of its key. Without keys `ANY_CLIENT`, or None (no states are kept) if other
            machines can reach the server.

        Raises:
            BadRequest: With status 401, if there are keys and the request carries none of them.
        """
        if not self.keys:
            return ANY_CLIENT if self.loopback else None
        scheme, _, key = (authorizations[0] if len(authorizations) == 1 else "").partition(" ")
        digest = _digest(key.strip())
        # Compare with every key, each in constant time.
        found = [i for i, own in enumerate(self.keys) if hmac.compare_digest(digest, _digest(own))]
        if scheme.lower() != "bearer" or not found:
            raise BadRequest(
                "this server needs an API key: send the header 'Authorization: Bearer KEY'"
                if not authorizations
                else "the API key is wrong",
                401,
            )
        return found[0]

    def _is_own_name(self, name: str | None) -> bool:
        return name is not None and (name in LOOPBACK_NAMES or name == self.host.lower())

    def _is_own_origin(self, origin: str, hosts: Sequence[str]) -> bool:
        match = re.fullmatch(r"https?://(.+)", origin.lower())
        name = _host_name(match[1]) if match else None
        if match is None or name is None:
            return False
        if name in LOOPBACK_NAMES:
            return True
        # DNS rebinding makes both headers agree on a foreign name, but not on an address.
        same = [match[1]] == [host.lower() for host in hosts]
        return same and (self._is_own_name(name) or _is_address(name))


def _host_name(netloc: str) -> str | None:
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s\[\]:/@]+))(?::\d{1,5})?", netloc.lower())
    return None if match is None else match[1] or match[2]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach a numeric address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def is_key(key: str) -> bool:
    """Return whether a text can be sent as an API key, and listed in the environment variable."""
    return re.fullmatch(r"[!-+\--~]{1,256}", key) is not None  # visible ASCII but the comma


def api_keys(given: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of the command line and of the environment variable, without repeats.

    Raises:
        UserError: If the variable holds something that cannot be a key.
    """
    listed = os.environ.get(KEYS_VARIABLE, "")
    keys = [key.strip() for key in listed.split(",")] if listed else []
    if not all(is_key(key) for key in keys):
        raise UserError(
            f"{KEYS_VARIABLE} must hold API keys separated by commas, each of 1 to 256 visible"
            " ASCII characters."
        )
    return tuple(dict.fromkeys([*given, *keys]))
