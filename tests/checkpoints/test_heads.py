"""A head on file that is not the embedding: refused by whoever loads it."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.checkpoint_files import SINGLE, all_tensors, edit_tensors, golden_copy
from helpers.models import GOLDEN, golden_model, golden_weights

from mlx_rgemma import Model, convert, load_model, register
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.griffin import model as griffin_model


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.fixture
def quantized(tmp_path):
    convert(GOLDEN / "tiny-sharded", tmp_path / "q", quantize=True, q_group_size=32, q_bits=4)
    (tmp_path / "q" / "model.safetensors.index.json").unlink()
    return tmp_path / "q"


def with_head(folder, change):
    """Write the parts of the embedding once more as those of a head, changed."""
    parts = {k: v for k, v in all_tensors(folder).items() if k.startswith("model.embed_tokens.")}
    mx.eval(list(parts.values()))
    for name, value in parts.items():
        part = name.rpartition(".")[2]
        edit_tensors(folder / SINGLE, **{f"lm_head__{part}": change(part, value)})


def last_row_changed(part, value):
    row = mx.zeros_like(value[-1:]) if part == "weight" else value[-1:]
    return mx.concatenate([value[:-1], row])


OTHER_HEADS = {
    "a value": last_row_changed,
    "scales": lambda part, value: value * (2 if part == "scales" else 1),
    "the dtype": lambda part, value: value.astype(mx.float32),
    "the shape": lambda part, value: value[:-1],
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("quantized", how) for how in OTHER_HEADS),
        *(("plain", how) for how in OTHER_HEADS if how != "scales"),
    ],
)
def test_mlx_lm_is_not_given_a_model_without_its_head(quantized, tmp_path, kind, how):
    """mlx-lm's own class uses such a head, `load_model` refuses it, and so does this class."""
    import mlx_lm.utils

    folder = golden_copy("tiny-2b", tmp_path) if kind == "plain" else quantized
    with_head(folder, lambda part, value: value)
    assert type(mlx_lm.utils.load_model(folder)[0]) is Model  # a redundant head
    with_head(folder, OTHER_HEADS[how])
    for refuse in (mlx_lm.utils.load_model, load_model):
        with pytest.raises(CheckpointError, match=r"lm_head\.\w+ differs from model.embed_tokens"):
            refuse(folder)


def test_a_head_without_an_embedding_or_with_parts_it_has_not():
    model, weights = golden_model("tiny-9b"), dict(golden_weights("tiny-9b"))
    assert "lm_head.weight" in weights
    with pytest.raises(CheckpointError, match=r"lm_head\.bias differs"):
        model.sanitize({**weights, "lm_head.bias": mx.zeros(97)})
    del weights["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        model.sanitize(weights)


def test_a_head_is_compared_in_blocks(monkeypatch):
    """Every block counts, a NaN equals itself, and little memory is needed beside the two."""
    monkeypatch.setattr(griffin_model, "COMPARE_BYTES", 1 << 16)
    embedding = mx.random.normal((4096, 257))
    embedding[7, 7] = mx.nan
    head = mx.contiguous(embedding + 0.0)
    mx.eval(embedding, head)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    griffin_model.check_tied_head("lm_head.weight", head, embedding)
    assert mx.get_peak_memory() - before < 1 << 20
    for place in ((0, 0), (2048, 100), (4095, 256)):
        other = mx.array(head)
        other[place] = 9.0
        with pytest.raises(CheckpointError, match="differs"):
            griffin_model.check_tied_head("lm_head.weight", other, embedding)
