"""The process group of a command under `mlx.launch`.

Ranks other than 0 print nothing but errors.
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

from mlx_rgemma.distributed import watchdog
from mlx_rgemma.distributed.rank_info import RankInfo
from mlx_rgemma.distributed.watchdog import Watchdog
from mlx_rgemma.errors import UserError
from mlx_rgemma.ops.streams import synchronize_streams


class _State:
    """The process group of this process."""

    joined = False
    group: mx.distributed.Group | None = None
    watchdog: Watchdog | None = None


_state = _State()


def join(seed: int | None = None) -> mx.distributed.Group | None:
    """Join the process group; None for a single process.

    The first call waits for the other ranks, for `watchdog.timeout_seconds` at most. From then on
    this process ends with a message when another rank is lost.

    Args:
        seed: Seed of the random numbers of all ranks; random when omitted.

    Raises:
        UserError: If a rank does not appear, or MLX cannot connect them.
    """
    if not _state.joined:
        info = RankInfo.from_environment()
        if info is not None:
            timeout = watchdog.timeout_seconds()
            _state.watchdog = Watchdog(info, timeout, watchdog.end_process)
            _state.watchdog.rendezvous()
            if info.rank > 0:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
        alone = info is None and "MLX_RANK" in os.environ  # mlx.launch -n 1
        group = None if alone else _connect(info)
        _state.joined = True
        if group is not None and group.size() > 1:
            _state.group = group
            mx.random.seed(broadcast_object(time.time_ns() & 0xFFFFFFFF if seed is None else seed))
    return _state.group


def group() -> mx.distributed.Group | None:
    """Return the group that was joined, if any."""
    return _state.group


def rank() -> int:
    """Return the rank of this process: 0 reads, writes and prints."""
    return 0 if _state.group is None else _state.group.rank()


def is_main_process() -> bool:
    """Return whether this process reports errors to the user; other ranks report to rank 0."""
    return rank() == 0 or _state.watchdog is None


def leave(problem: str = "", status: int | None = None, *, mistake: bool = False) -> None:
    """Leave the group: when all ranks are done, or at once if this one has failed.

    Args:
        problem: Why this rank failed; the other ranks end as well.
        status: Exit status to end this process with, unless an exception is being raised.
        mistake: Whether the problem is a user error, which the other ranks will find as well.
    """
    dog, _state.watchdog = _state.watchdog, None
    if dog is None:
        return
    if problem:
        grace = watchdog.MISTAKE_GRACE_SECONDS if mistake else watchdog.GRACE_SECONDS
        dog.report_failure(problem, grace)
        if dog.info.rank > 0:
            # Rank 0 informs the user; mlx.launch ends it as soon as this process has ended.
            time.sleep(2 * grace)
    else:
        if _state.group is not None:
            synchronize_streams()
        dog.shutdown_barrier()
    if status is not None and sys.exc_info()[0] is None:
        # MLX may abort at interpreter exit if a thread has generated.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def abandon(problem: str) -> None:
    """End all ranks at once, because they are out of step."""
    leave(problem)
    watchdog.end_process(f"rank {rank()} {problem}")


def wait_for_failure_report() -> None:
    """Wait briefly: a peer's failure report gives a better error than MLX's."""
    if _state.watchdog is not None:
        time.sleep(2.0)


def broadcast_object(value: Any, group: mx.distributed.Group | None = None) -> Any:
    """Return rank 0's value on all ranks; the values of the others are ignored.

    Args:
        value: Anything that can be pickled.
        group: The group; the one that was joined when omitted.
    """
    group = group or _state.group
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
    """Return rank 0's arrays, bit for bit, on all ranks; the others pass None."""
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
    """Call a function on rank 0 only; a `UserError` is raised on all ranks.

    Args:
        work: The function.
        group: As for `broadcast_object`.

    Returns:
        Its result on all ranks, which must be picklable.
    """
    group = group or _state.group
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
    """Return a sampler that yields rank 0's tokens on all ranks.

    All-reduced sums may differ in the last bit between ranks (another order of addition, another
    GPU), and so, rarely, may the sampled token.
    """
    if _state.group is None:
        return sampler

    def choose(logprobs: mx.array) -> mx.array:
        token = sampler(logprobs)
        mine = token if rank() == 0 else mx.zeros_like(token)
        return mx.distributed.all_sum(mine, group=_state.group)

    return choose


def _connect(info: RankInfo | None) -> mx.distributed.Group:
    try:
        with _deadline(info):
            group = mx.distributed.init(strict=info is not None)
    except RuntimeError as error:
        raise UserError(f"MLX cannot connect the processes: {error}.") from error
    if info is not None and (group.rank(), group.size()) != (info.rank, info.size):
        raise UserError(
            f"mlx.launch started rank {info.rank} of {info.size}, MLX made it"
            f" {group.rank()} of {group.size()}; check --backend and the hostfile."
        )
    return group


@contextlib.contextmanager
def _deadline(info: RankInfo | None) -> Iterator[None]:
    """End the process after the timeout, with one line printed by rank 0.

    MLX holds the interpreter lock while it connects, so `faulthandler` has to end the process. Its
    output goes to a child process, which then prints the message.
    """
    if info is None:
        yield
        return
    seconds = watchdog.timeout_seconds()
    message = (
        f"MLX has not connected the {info.size} processes within {seconds:g} s: one was lost, or"
        " cannot reach the next one's address in the hostfile; start them again"
    )
    script = 'read -r _ && echo "error: $0." >&2' if info.rank == 0 else "read -r _"
    with subprocess.Popen(["/bin/sh", "-c", script, message], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        faulthandler.dump_traceback_later(seconds, exit=True, file=child.stdin)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
