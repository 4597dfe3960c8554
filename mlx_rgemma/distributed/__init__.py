"""Several processes under `mlx.launch`: joining them, agreeing, and noticing one that is lost."""

from mlx_rgemma.distributed.group import (
    abandon,
    agreed,
    group,
    join,
    leave,
    lost_by_others,
    outcome,
    rank,
    share,
    share_arrays,
    speaks,
)

__all__ = [
    "abandon",
    "agreed",
    "group",
    "join",
    "leave",
    "lost_by_others",
    "outcome",
    "rank",
    "share",
    "share_arrays",
    "speaks",
]
