"""Where `mlx.launch` has put a process: its number, and the addresses of the others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_rgemma.errors import UserError

Address = tuple[str, int]


class RankInfo(NamedTuple):
    """Where a process stands among the others.

    Attributes:
        rank: Its number.
        size: How many there are.
        listen: The address where others call it; None if none does.
        callers: The numbers of those that do.
        calls: Whom it calls itself, and where.
    """

    rank: int
    size: int
    listen: Address | None
    callers: frozenset[int]
    calls: Mapping[int, Address]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo | None:
        """What `mlx.launch` says; None for a process by itself, or under another launcher.

        With the ring back end each process calls the next one; with the others all call the first.

        Raises:
            UserError: If it says something that cannot be.
        """
        if "MLX_RANK" not in environment:
            return None
        try:
            return cls._read(environment)
        except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
            raise UserError(
                f"the variables that mlx.launch sets do not fit together"
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
            raise ValueError("two processes have the same address")
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
    values = json.loads(text) if text else []  # empty where there is one host
    if not isinstance(values, list):
        raise ValueError(f"{path} holds no list")
    return values


def _check_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} processes")


def _address(text: Any) -> Address:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no address")
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    host.encode("idna")  # as the socket will; what it refuses is a ValueError here
    if not host or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r} is no address and port")
    return host, int(port)
