"""Damaged input: see README.md."""

from __future__ import annotations

import pytest

from fuzz.harness import GROUPS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", GROUPS["training"])
def test_refused_in_one_line_or_accepted(fuzz, family):
    fuzz(family)
