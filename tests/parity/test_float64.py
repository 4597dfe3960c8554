"""The float64 model that exactness is measured against, and docs/design/numerics.md on it."""

from __future__ import annotations

import pytest
from helpers.assertions import ON_GPU, max_error
from helpers.float64_model import float64_logits
from helpers.models import golden, golden_model

from benchmarks.float64_distance import ALL_ATTENTION, UNSCALED, Case, measure
from mlx_rgemma import GriffinConfig


@pytest.mark.parametrize("window", ["google", "hf"])
def test_it_is_google_s_model(model_name, window):
    """Within the float32 rounding of Google's and Hugging Face's code."""
    model = golden_model(model_name, window=window)
    data = golden(f"logits/{model_name}.npz")
    lengths = sorted(int(k.removeprefix("tokens_L")) for k in data if k.startswith("tokens"))
    for length in lengths:
        tokens, expected = data[f"tokens_L{length}"], data[f"{window}_L{length}"]
        for row, logits in zip(tokens, expected, strict=True):
            assert max_error(float64_logits(model, row), logits) < 2e-5, length


@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (Case("released rules", 64, 1500, 1), 1e-5),
        (Case("attention alone", 64, 1500, 1, ALL_ATTENTION), 1e-5),
        (Case("no scale, no cap", 256, 64, 2, UNSCALED), 2e-4),  # logits of 200
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.skipif(ON_GPU, reason="a GPU multiplies float32 in reduced precision")
def test_how_far_float32_is_from_it(case, bound):
    cells = [cell.strip() for cell in measure(case).strip("|").split("|")]
    assert cells[:4] == [case.name, str(case.width), f"{case.length:,}", str(case.seeds)]
    rms, largest, rms_of_steps, largest_of_steps = map(float, cells[5:])
    assert 0 < rms < largest < bound and 0 < rms_of_steps < largest_of_steps < bound


def test_the_scale_of_the_embedding_is_rounded_to_bfloat16():
    """sqrt(2560) is 50.596 and 50.5 in bfloat16."""
    from helpers.float64_model import _bfloat16

    assert _bfloat16(GriffinConfig.preset("2b").hidden_size ** 0.5) == 50.5
    assert _bfloat16(GriffinConfig.preset("9b").hidden_size ** 0.5) == 64.0
