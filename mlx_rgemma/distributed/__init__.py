"""Several processes under `mlx.launch`: joining them, agreeing, and noticing one that is lost."""

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
