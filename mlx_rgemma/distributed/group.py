"""The group of processes that a command runs in under `mlx.launch`.

One place where it is joined and left. Whoever is not the first process prints nothing but errors.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_rgemma.distributed import watchdog as peers
from mlx_rgemma.distributed.rank_info import RankInfo
from mlx_rgemma.errors import UserError
from mlx_rgemma.ops.streams import synchronize_streams


class _Membership:
    """This process's place in the group; there is one of these, `_here`."""

    joined = False
    group: mx.distributed.Group | None = None
    peers: peers.Peers | None = None


_here = _Membership()


def join(seed: int | None = None) -> mx.distributed.Group | None:
    """The group that this process is part of, or None if it is by itself.

    The first call waits for the other processes, for `peers.timeout_seconds` at most, and from
    then on this process ends with a message when another one is lost.

    Args:
        seed: Of the random numbers, which are the same on all processes; any, when omitted.

    Raises:
        UserError: If a process does not come, or MLX cannot connect them.
    """
    if not _here.joined:
        place = RankInfo.from_environment()
        if place is not None:
            timeout = peers.timeout_seconds()
            _here.peers = peers.Peers(place, timeout, peers.end_process)
            _here.peers.rendezvous()
            if place.rank > 0:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
        alone = place is None and "MLX_RANK" in os.environ  # mlx.launch -n 1
        group = None if alone else _connect(place)
        _here.joined = True
        if group is not None and group.size() > 1:
            _here.group = group
            mx.random.seed(broadcast_object(time.time_ns() & 0xFFFFFFFF if seed is None else seed))
    return _here.group


def group() -> mx.distributed.Group | None:
    """The group that was joined, if it was."""
    return _here.group


def rank() -> int:
    """This process's number: 0 for the first one, which reads, writes and prints."""
    return 0 if _here.group is None else _here.group.rank()


def is_main_process() -> bool:
    """Whether this process tells the user of its mistakes; the others tell the first one."""
    return rank() == 0 or _here.peers is None


def leave(problem: str = "", status: int | None = None, *, mistake: bool = False) -> None:
    """Part from the others: when all are done, or at once where this one has failed.

    Args:
        problem: Why this process cannot go on; the others end with it.
        status: End this process with it, unless an exception is on its way to tell the user more.
        mistake: Whether the problem is the user's, so that the others will meet it, too.
    """
    line, _here.peers = _here.peers, None
    if line is None:
        return
    if problem:
        grace = peers.MISTAKE_GRACE_SECONDS if mistake else peers.GRACE_SECONDS
        line.lost(problem, grace)
        if line.place.rank > 0:
            # The first process tells the user; mlx.launch ends it as soon as this one has ended.
            time.sleep(2 * grace)
    else:
        if _here.group is not None:
            synchronize_streams()
        line.shutdown_barrier()
    if status is not None and sys.exc_info()[0] is None:
        # MLX may abort while an interpreter is being taken down that has generated in a thread.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def abandon(problem: str) -> None:
    """End this process at once, and the others with it: they are no longer in step."""
    leave(problem)
    peers.end_process(f"rank {rank()} {problem}")


def wait_for_failure_report() -> None:
    """Give word of a lost process the time to come; it ends this one with a better message."""
    if _here.peers is not None:
        time.sleep(2.0)


def broadcast_object(value: Any, group: mx.distributed.Group | None = None) -> Any:
    """The first process's value, on all of them; what the others pass is not looked at.

    Args:
        value: Anything that can be pickled.
        group: The processes; those that were joined, when omitted.
    """
    group = group or _here.group
    if group is None:
        return value
    first = group.rank() == 0
    data = pickle.dumps(value) if first else b""
    synchronize_streams()
    size: Any = mx.distributed.all_sum(mx.array(len(data), mx.int32), group=group).item()
    mine = mx.array(list(data), mx.uint8) if first else mx.zeros(size, mx.uint8)
    total: Any = mx.distributed.all_sum(mine, group=group)
    return pickle.loads(bytes(memoryview(total)))


def broadcast(arrays: Sequence[mx.array] | None, group: mx.distributed.Group) -> list[mx.array]:
    """The first process's arrays, bit by bit, on all of them; the others pass None."""
    mine = list(arrays or ())
    kinds = broadcast_object(
        [(a.shape, str(a.dtype).removeprefix("mlx.core.")) for a in mine], group
    )
    if group.rank() > 0:
        mine = [mx.zeros(shape, _dtype(name)) for shape, name in kinds]
    shared = []
    for array in mine:
        total = mx.distributed.all_sum(array.flatten().view(mx.uint8), group=group)
        mx.eval(total)
        shared.append(total.view(array.dtype).reshape(array.shape))
    return shared


def _dtype(name: str) -> mx.Dtype:
    return mx.bool_ if name == "bool" else getattr(mx, name)


def run_on_rank0(work: Callable[[], Any], group: mx.distributed.Group | None = None) -> Any:
    """Do something on the first process only; a `UserError` there is one on all.

    Args:
        work: What to do.
        group: As for `share`.

    Returns:
        What it returned, on all of them; it must be something that can be pickled.
    """
    group = group or _here.group
    answer: Any = None
    problem: Exception | None = None
    if group is None or group.rank() == 0:
        try:
            answer = work()
        except (UserError, OSError) as error:
            problem = error
    answer, problem = broadcast_object((answer, problem), group)
    if problem is not None:
        raise problem
    return answer


def synchronized_sampler(sampler: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """A sampler whose tokens are the first process's on all of them.

    Sums may differ in the last bit between processes, where a back end adds in another order or a
    machine is of another make, and a token once in a long while with them.
    """
    if _here.group is None:
        return sampler

    def choose(logprobs: mx.array) -> mx.array:
        token = sampler(logprobs)
        mine = token if rank() == 0 else mx.zeros_like(token)
        return mx.distributed.all_sum(mine, group=_here.group)

    return choose


def _connect(place: RankInfo | None) -> mx.distributed.Group:
    try:
        with _deadline(place):
            group = mx.distributed.init(strict=place is not None)
    except RuntimeError as error:
        raise UserError(f"MLX cannot connect the processes: {error}.") from error
    if place is not None and (group.rank(), group.size()) != (place.rank, place.size):
        raise UserError(
            f"mlx.launch started rank {place.rank} of {place.size}, MLX made it"
            f" {group.rank()} of {group.size()}; check --backend and the hostfile."
        )
    return group


@contextlib.contextmanager
def _deadline(place: RankInfo | None) -> Iterator[None]:
    """End the process if this takes longer than one waits for another, with one line of the first.

    MLX connects without letting other threads of Python run, so `faulthandler` ends the process,
    and what that has to say makes another program speak, which waits for it.
    """
    if place is None:
        yield
        return
    seconds = peers.timeout_seconds()
    message = (
        f"MLX has not connected the {place.size} processes within {seconds:g} s: one was lost, or"
        " cannot reach the next one's address in the hostfile; start them again"
    )
    speak = 'read -r _ && echo "error: $0." >&2' if place.rank == 0 else "read -r _"
    with subprocess.Popen(["/bin/sh", "-c", speak, message], stdin=subprocess.PIPE) as speaker:
        assert speaker.stdin is not None
        faulthandler.dump_traceback_later(seconds, exit=True, file=speaker.stdin)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
