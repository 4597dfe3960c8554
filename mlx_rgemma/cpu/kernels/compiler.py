"""How the Numba kernels are compiled, and cached on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import njit

from mlx_rgemma.cpu import fastmath


def _digest() -> str:
    """Return a digest of all source files that a kernel may be made of."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(fastmath.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


_DIGEST = _digest()


def _compiled(**flags: Any) -> Any:
    """Compile a function that releases the GIL, cached on disk if there is a place.

    Numba recompiles when the function's own file changes, but not when one that it imports from
    does; so the name in the cache changes with any of them.
    """

    def decorate(function: Any) -> Any:
        function.__qualname__ += "_" + _DIGEST
        options = {"nogil": True, "error_model": "numpy", **flags}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written to
            return njit(**options)(function)

    return decorate


kernel = _compiled(fastmath={"contract"})
"""Multiply-adds may be contracted; their order stays: `exponent_and_fraction` relies on it."""
exact_kernel = _compiled()
reduction = _compiled(fastmath={"contract", "reassoc", "nsz"})
"""Sums in any order: several at a time."""
