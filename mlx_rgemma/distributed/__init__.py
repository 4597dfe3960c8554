"""Process groups under `mlx.launch`: rendezvous, broadcast, and detection of lost ranks."""

from mlx_rgemma.distributed.group import (
    abandon,
    broadcast,
    broadcast_object,
    group,
    is_main_process,
    join,
    leave,
    rank,
    run_on_rank0,
    synchronized_sampler,
    wait_for_failure_report,
)

__all__ = [
    "abandon",
    "broadcast",
    "broadcast_object",
    "group",
    "is_main_process",
    "join",
    "leave",
    "rank",
    "run_on_rank0",
    "synchronized_sampler",
    "wait_for_failure_report",
]
