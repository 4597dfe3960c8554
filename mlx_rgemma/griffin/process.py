"""MLX does not survive a fork: its threads stay behind, and the child would wait for them."""

from __future__ import annotations

import os

from mlx_rgemma.errors import UserError

_owner: int | None = None  # the process that made the first model


def refuse_forked_process() -> None:
    """Refuse to run a model in a child that was forked from a process with a model.

    Called where a model is made and wherever one begins to run. No hook is installed: the cost is
    that of `os.getpid`.

    Raises:
        UserError: In such a child.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
    elif _owner != os.getpid():
        raise UserError(
            "MLX cannot run in a process that was forked after MLX was used: start it with"
            " 'spawn' (multiprocessing.get_context('spawn')), and load the model in it."
        )
