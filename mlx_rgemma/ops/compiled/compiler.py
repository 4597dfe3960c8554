"""How the loops are compiled, and kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import njit

from mlx_rgemma.ops import exponential


def _digest() -> str:
    """Of all that a loop may be made of."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(exponential.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


_DIGEST = _digest()


def _compiled(**flags: Any) -> Any:
    """Compile a function: without the interpreter's lock, kept on disk if there is a place.

    Numba compiles anew when the function's own file changes, but not when one that it imports from
    does; so it is kept under a name that changes with any of them.
    """

    def decorate(function: Any) -> Any:
        function.__qualname__ += "_" + _DIGEST
        options = {"nogil": True, "error_model": "numpy", **flags}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written to
            return njit(**options)(function)

    return decorate


loop = _compiled(fastmath={"contract"})
"""Products and sums may be contracted; their order stays, on which `functions.split` relies."""
exact_loop = _compiled()
reduction = _compiled(fastmath={"contract", "reassoc", "nsz"})
"""Sums in any order: several at a time."""
