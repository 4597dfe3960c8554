"""Requirements of tests, as marks."""

from __future__ import annotations

import metal_emulator
import pytest

_compiler, _reason = metal_emulator.compiler()
needs_compiler = pytest.mark.skipif(_compiler is None, reason=f"kernels not compiled: {_reason}")
