"""Whether a module still holds what it held: asked at every step of a decode loop."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn


class Snapshot:
    """The arrays, modules and attributes of a module, and of all within it.

    Args:
        module: The root.
    """

    def __init__(self, module: nn.Module) -> None:
        self.sizes: list[tuple[Any, int]] = []
        self.places: list[tuple[Any, Any, Any]] = []
        self._take(module)

    def _take(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._note(vars(value), vars(value).items())
        if isinstance(value, dict):
            self._note(value, value.items())
        elif isinstance(value, list):
            self._note(value, enumerate(value))

    def _note(self, container: Any, items: Any) -> None:
        self.sizes.append((container, len(container)))
        for key, value in items:
            self.places.append((container, key, value))
            self._take(value)

    def holds(self) -> bool:
        """Whether everything is the very same object in the very same place."""
        try:
            return all(container[key] is value for container, key, value in self.places) and all(
                len(container) == size for container, size in self.sizes
            )
        except (KeyError, IndexError):
            return False
