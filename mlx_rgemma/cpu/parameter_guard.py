"""Detects replaced parameters by identity; cheap enough to call per token."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn


class ParameterGuard:
    """The arrays and attributes of a module, and of all modules within it.

    Args:
        module: The root.
    """

    def __init__(self, module: nn.Module) -> None:
        self.sizes: list[tuple[Any, int]] = []
        self.entries: list[tuple[Any, Any, Any]] = []
        self._add(module)

    def _add(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._add_entries(vars(value), vars(value).items())
        if isinstance(value, dict):
            self._add_entries(value, value.items())
        elif isinstance(value, list):
            self._add_entries(value, enumerate(value))

    def _add_entries(self, container: Any, items: Any) -> None:
        self.sizes.append((container, len(container)))
        for key, value in items:
            self.entries.append((container, key, value))
            self._add(value)

    def unchanged(self) -> bool:
        """Return whether every object is still the very same one in the very same place."""
        try:
            return all(container[key] is value for container, key, value in self.entries) and all(
                len(container) == size for container, size in self.sizes
            )
        except (KeyError, IndexError):
            return False
