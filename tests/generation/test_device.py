"""A Mac's memory while a model generates, as far as that can be tried without one."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.models import golden_model

from mlx_rgemma.ops import streams as device

RECOMMENDED = 12_000_000


@pytest.fixture
def limits(monkeypatch) -> list[int]:
    """The limits that are set, on a GPU that begins with one of 5."""
    seen = [5]

    def set_wired_limit(limit: int) -> int:
        seen.append(limit)
        return seen[-2]

    facts = {"max_recommended_working_set_size": RECOMMENDED}
    monkeypatch.setattr(mx, "device_info", lambda: facts)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    return seen


def test_the_limit_is_raised_and_put_back(limits, capsys):
    with device.wired_limit(golden_model("tiny-2b"), device.generation_stream):
        assert limits == [5, RECOMMENDED]
    assert limits == [5, RECOMMENDED, 5]
    with (
        pytest.raises(KeyError),
        device.wired_limit(golden_model("tiny-2b"), device.generation_stream),
    ):
        raise KeyError
    assert limits[-1] == 5 and len(limits) == 5
    assert capsys.readouterr().err == ""


def test_a_model_that_hardly_fits_gives_a_warning(limits, monkeypatch, capsys):
    model = golden_model("tiny-2b")
    size = sum(x.nbytes for x in model.parameters()["model"]["embed_tokens"].values())
    facts = {"max_recommended_working_set_size": size}
    monkeypatch.setattr(mx, "device_info", lambda: facts)
    with device.wired_limit(model, device.generation_stream):
        pass
    error = capsys.readouterr().err
    assert error.startswith("warning: the model takes ") and error.count("\n") == 1


def test_a_cpu_has_no_limit(limits, monkeypatch):
    monkeypatch.setattr(mx, "device_info", dict)
    with device.wired_limit(golden_model("tiny-2b"), device.generation_stream):
        assert limits == [5]
    assert limits == [5]
