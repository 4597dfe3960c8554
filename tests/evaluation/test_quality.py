"""Perplexity and KL: against a plain full pass, whatever the batches, chunks and memory."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.models import golden_model

from mlx_rgemma import GriffinConfig, convert, load
from mlx_rgemma.checkpoints.save import save_model
from mlx_rgemma.errors import UserError
from mlx_rgemma.evaluation import perplexity as measures
from mlx_rgemma.evaluation.perplexity import Reference, TokenizedText, measure, tokenize_documents
from mlx_rgemma.evaluation.report import (
    Result,
    Size,
    measure_folder,
    reference_of,
    state_bytes,
    sweep,
    table,
)
from mlx_rgemma.griffin.cache import state_nbytes
from mlx_rgemma.io.hub import EMBEDDED, Source
from mlx_rgemma.io.text import read_documents


@pytest.fixture(scope="module")
def rows():
    """TokenizedText of unequal length, longer than the window of 16 and than a chunk."""
    rng = np.random.default_rng(0)
    return TokenizedText([rng.integers(3, 97, n).tolist() for n in (2, 9, 40, 150)], 500)


@pytest.fixture(scope="module")
def models():
    return golden_model("tiny-9b"), rounded_model()


def rounded_model():
    """The same with the weights in bfloat16, but computed in float32."""
    model = golden_model("tiny-9b", mx.bfloat16, fuse=False)
    model.set_dtype(mx.float32)
    return model


def directly(model, rows, other=None):
    """The same figures from whole rows, one at a time, in float64."""
    nats, kl, same = [], [], []
    for row in rows.sequences:
        logp = [log_softmax64(m, row) for m in (model, other) if m is not None]
        nats.append(-logp[0][np.arange(len(row) - 1), row[1:]])
        if other is not None:
            kl.append((np.exp(logp[1]) * (logp[1] - logp[0])).sum(-1))
            same.append(logp[1].argmax(-1) == logp[0].argmax(-1))
    mean = np.concatenate(nats)
    extra = (np.concatenate(kl).mean(), np.concatenate(same).mean()) if other is not None else ()
    return (math.exp(mean.mean()), mean.std(ddof=1) / math.sqrt(mean.size), *extra)


def log_softmax64(model, row):
    logits = np.array(model(mx.array([row[:-1]])))[0].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("tokens_at_once", [4, 256])
def test_against_whole_rows(monkeypatch, rows, models, batch_size, tokens_at_once):
    monkeypatch.setattr(measures, "TOKENS_AT_ONCE", tokens_at_once)
    rows = TokenizedText(rows.sequences, rows.nbytes, batch_size)
    found = measure(models[0], rows, Reference(models[1], rows))
    perplexity, error, kl, same = directly(*models[:1], rows, models[1])
    assert found.tokens == rows.predicted == 197
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.standard_error == pytest.approx(perplexity * error, rel=1e-4)
    assert found.mean_kl == pytest.approx(kl, rel=1e-2)
    assert kl > 1e-5
    assert found.top1_agreement == pytest.approx(same)
    assert found.bits_per_byte == pytest.approx(math.log2(perplexity) * 197 / 500, rel=1e-5)


def test_a_model_against_itself(rows, models):
    found = measure(models[0], rows, Reference(models[0], rows))
    assert found.mean_kl < 1e-10 and found.top1_agreement == 1.0
    alone = measure(models[0], rows)
    assert alone.mean_kl is None and alone.top1_agreement is None
    assert alone.perplexity == found.perplexity


def test_a_reference_outlives_its_model(rows):
    """It keeps hidden states and the embedding, so the model's other weights can go."""
    model = golden_model("tiny-9b")
    expected = directly(rounded_model(), rows, model)
    reference = Reference(model, rows)
    del model
    found = measure(rounded_model(), rows, reference)
    assert found.mean_kl == pytest.approx(expected[2], rel=1e-2)
    reference.close()


def test_memory_does_not_grow_with_the_text():
    """A text four times as long takes no more: logits of 256 tokens are held, at most."""
    model = golden_model("tiny-9b")
    rng = np.random.default_rng(1)
    peaks = []
    for length in (1000, 4000):
        rows = TokenizedText([rng.integers(3, 97, length).tolist()], 1)
        found = []
        for _ in range(4):  # MLX's thread lets go of arrays earlier or later
            mx.clear_cache()
            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            measure(model, rows, Reference(model, rows))
            found.append((mx.get_peak_memory() - before) / 1e6)
        peaks.append(max(found))
    assert peaks[1] < 1.05 * peaks[0] + 0.1
    assert 0.2 * peaks[0] < 4000 * 97 * 4 / 1e6  # what all logits would add does count


def test_models_of_different_vocabularies(rows, models):
    with pytest.raises(UserError, match="have 2048 and 97 tokens"):
        measure(load()[0], rows, Reference(models[0], rows))


def test_rows():
    _, tokenizer = load()
    texts = ["Once upon a time.", "The cat sat on the mat and slept."]
    rows = tokenize_documents(tokenizer, texts)
    assert rows.sequences == [[*tokenizer.encode(t), tokenizer.eos_token_id] for t in texts]
    assert rows.sequences[0][0] == tokenizer.bos_token_id
    assert rows.nbytes == sum(len(t) + 1 for t in texts)
    cut = tokenize_documents(tokenizer, texts, sequence_length=5)
    stream = [token for row in rows.sequences for token in row]
    assert [t for row in cut.sequences for t in row] == stream[: len(stream) // 5 * 5]
    assert {len(row) for row in cut.sequences} == {5}
    some = tokenize_documents(tokenizer, texts, sequence_length=5, num_samples=2)
    assert len(some.sequences) == 2 and all(row in cut.sequences for row in some.sequences)
    with pytest.raises(UserError, match="holds no sequence of 500 tokens"):
        tokenize_documents(tokenizer, texts, sequence_length=500)


def test_size(tmp_path):
    made = convert(EMBEDDED, tmp_path / "q8", quantize=True, q_bits=8)
    size = Size.of(tmp_path / "q8")
    assert (size.weight_bytes, size.parameters) == (made.nbytes, made.parameters)
    assert size.bits_per_weight == made.bits_per_weight
    assert size.file_bytes == (tmp_path / "q8" / "model.safetensors").stat().st_size
    model, _ = load(tmp_path / "q8", dtype="bfloat16")
    assert size.state_bytes == state_nbytes(model.make_cache())
    assert size.bytes_per_token == made.nbytes + size.state_bytes


def test_size_of_the_released_shapes():
    """The figures of the README: 17.2 MB of state for 2B, 26.2 MB for 9B."""
    small, large = (GriffinConfig.preset(name) for name in ("2b", "9b"))
    assert state_bytes(small, mx.bfloat16) == 17246208
    assert round(state_bytes(large, mx.bfloat16) / 1e6, 1) == 26.2


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory):
    """The embedded model in several settings, on two of the stories."""
    _, tokenizer = load()
    rows = tokenize_documents(tokenizer, read_documents()[:2])
    settings = {
        "plain": {},
        "rgemma": {"quantize": True},
        "4": {"quantize": True, "q_bits": 4},
        "4, groups of 32": {"quantize": True, "q_bits": 4, "q_group_size": 32},
        "5": {"quantize": True, "q_bits": 5},
        "groups of 128": {"quantize": True, "q_group_size": 128},
    }
    work = tmp_path_factory.mktemp("survey")
    entries, skipped = sweep(Source(EMBEDDED), settings, rows, work)
    assert list(work.iterdir()) == []
    return {entry.name: entry for entry in entries}, skipped


def test_survey(surveyed):
    entries, skipped = surveyed
    assert list(entries) == ["plain", "rgemma", "4", "4, groups of 32", "5"]
    kl = {name: entry.quality.mean_kl for name, entry in entries.items()}
    assert kl["plain"] < 1e-9 < 0.005 < kl["5"] < kl["rgemma"] < kl["4"] < 0.2
    assert "divides no width" in skipped["groups of 128"]
    sizes = {name: entry.size.file_bytes for name, entry in entries.items()}
    assert sizes["plain"] > 2 * sizes["5"] > 2 * sizes["rgemma"] > 2 * sizes["4"]


def test_our_recipe_beats_equal_bits_of_its_size(surveyed):
    """Between 4 and 5 bits for all, on the line (in the logarithm of KL), it would be worse.

    It is also better, and smaller, than 4 bits in groups of 32.
    """
    kl = {name: entry.quality.mean_kl for name, entry in surveyed[0].items()}
    bits = {name: entry.size.bits_per_weight for name, entry in surveyed[0].items()}
    share = (bits["rgemma"] - bits["4"]) / (bits["5"] - bits["4"])
    line = math.exp((1 - share) * math.log(kl["4"]) + share * math.log(kl["5"]))
    assert kl["rgemma"] < 0.9 * line
    assert kl["rgemma"] < 0.8 * kl["4, groups of 32"]
    assert bits["rgemma"] < bits["4, groups of 32"]


def test_table():
    size = Size(3_400_000_000, 3_300_000_000, 17_000_000, 2_700_000_000)
    found = measure(golden_model("tiny-9b"), TokenizedText([[1, 2, 3]], 9))
    text = table([Result("a model", size, found)])
    assert [line.count("|") for line in text.splitlines()] == [6, 6, 6]
    assert "3.40 GB" in text and "9.78" in text and "mean KL" not in text


def test_folders_are_measured_one_after_the_other(tmp_path):
    save_model(tmp_path / "half", load(dtype="bfloat16")[0], source=EMBEDDED)
    _, tokenizer = load()
    rows = tokenize_documents(tokenizer, ["Once upon a time there was a cat."])
    entry = measure_folder("half", tmp_path / "half", rows, reference_of(None, rows))
    assert entry.quality.mean_kl < 1e-9
    assert entry.as_dict()["bits_per_weight"] == 16.0
