"""Rank, world size and addresses that `mlx.launch` gives to a process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_rgemma.errors import UserError

Address = tuple[str, int]


class RankInfo(NamedTuple):
    """Rank of a process, and the connections of the watchdog.

    Attributes:
        rank: Its rank.
        size: World size.
        listen: The address where other ranks connect; None if none does.
        callers: The ranks that connect here.
        calls: The ranks that this one connects to, and their addresses.
    """

    rank: int
    size: int
    listen: Address | None
    callers: frozenset[int]
    calls: Mapping[int, Address]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo | None:
        """Read the variables of `mlx.launch`; None for a single process or another launcher.

        With the ring backend each rank connects to the next one; with the others all connect to
        rank 0.

        Raises:
            UserError: If the variables are inconsistent.
        """
        if "MLX_RANK" not in environment:
            return None
        try:
            return cls._read(environment)
        except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
            raise UserError(
                f"the variables that mlx.launch sets are inconsistent"
                f" ({type(error).__name__}: {error}); check the hostfile."
            ) from error

    @classmethod
    def _read(cls, environment: Mapping[str, str]) -> RankInfo | None:
        rank = int(environment["MLX_RANK"])
        if "MLX_HOSTFILE" in environment:
            hosts = _read_list(environment["MLX_HOSTFILE"])
            return cls._ring(rank, [_address(host[0]) for host in hosts])
        if "MLX_JACCL_COORDINATOR" in environment:
            size = len(_read_list(environment["MLX_IBV_DEVICES"]))
            return cls._star(rank, size, _address(environment["MLX_JACCL_COORDINATOR"]))
        if "NCCL_HOST_IP" in environment:
            first = _address(f"{environment['NCCL_HOST_IP']}:{environment['NCCL_PORT']}")
            return cls._star(rank, int(environment["MLX_WORLD_SIZE"]), first)
        return None

    @classmethod
    def _ring(cls, rank: int, addresses: list[Address]) -> RankInfo | None:
        size = len(addresses)
        if size < 2:
            return None
        _check_rank(rank, size)
        if len(set(addresses)) < size:
            raise ValueError("two ranks have the same address")
        after, before = (rank + 1) % size, (rank - 1) % size
        return cls(rank, size, addresses[rank], frozenset({before}), {after: addresses[after]})

    @classmethod
    def _star(cls, rank: int, size: int, first: Address) -> RankInfo | None:
        if size < 2:
            return None
        _check_rank(rank, size)
        if rank == 0:
            return cls(rank, size, first, frozenset(range(1, size)), {})
        return cls(rank, size, None, frozenset(), {0: first})


def _read_list(path: str) -> list[Any]:
    text = Path(path).read_text().strip()
    values = json.loads(text) if text else []  # empty for a single host
    if not isinstance(values, list):
        raise ValueError(f"{path} is not a list")
    return values


def _check_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} processes")


def _address(text: Any) -> Address:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not an address")
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    host.encode("idna")  # the socket would raise later; a ValueError here
    if not host or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r} is not an address with a port")
    return host, int(port)
