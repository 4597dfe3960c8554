"""What a step of training holds: the count is kept to by measurement, and 2B fits a 16 GB Mac."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_rgemma import GriffinConfig, Model
from mlx_rgemma.adapters.files import AdapterConfig, add_adapters
from mlx_rgemma.griffin.config import PRESETS
from mlx_rgemma.ops import backend
from mlx_rgemma.tuner.data.packing import Batch
from mlx_rgemma.tuner.grad_checkpoint import checkpoint_layers
from mlx_rgemma.tuner.loss import batch_loss
from mlx_rgemma.tuner.memory_estimate import lora_step
from mlx_rgemma.tuner.optim import adamw
from mlx_rgemma.tuner.train_state import TrainingState
from mlx_rgemma.tuner.trainer import Loop, LoopSettings


def griffin(kinds: str, width: int, vocabulary: int) -> Model:
    names = {"r": "recurrent", "a": "attention"}
    values = {
        "model_type": "recurrent_gemma",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "lru_width": width,
        "intermediate_size": 6 * width,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": width // 64,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "block_types": [names[kind] for kind in kinds],
        "attention_window_size": 512,
        "logits_soft_cap": 30.0,
    }
    return Model(GriffinConfig.from_dict(values))


def measured_peak(model: Model, tokens: int) -> int:
    """Bytes at the peak of a step, the model's own among them."""
    ids = mx.arange(tokens + 1)[None] % model.args.vocab_size
    batch = Batch(ids[:, :-1], ids[:, 1:], mx.ones((1, tokens), mx.bool_), mx.arange(tokens)[None])
    add_adapters(model, AdapterConfig(num_layers=-1, rank=8))
    checkpoint_layers(model)
    model.train()
    mx.eval(model.parameters(), vars(batch))
    mx.clear_cache()
    before = mx.get_active_memory() - weights(model)
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, lambda m: batch_loss(m, batch)[0])(model))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
def test_layers_of_the_cpu_backend_are_covered_too(quantized):
    """`load` replaces linear layers on a Linux CPU by others, which evaluate at once."""
    model = griffin("rra", 128, 512)
    if quantized:
        nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    backend.prepare(model, dequantize=False)
    assert measured_peak(model, 512) < lora_step(model.args, 512, weights(model)).peak


def weights(model: Model) -> int:
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
@pytest.mark.parametrize("kinds", ["rrarra", "aaa"])
def test_count_covers_what_is_measured(kinds, quantized):
    model = griffin(kinds, 128, 512)
    if quantized:
        nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    counted = lora_step(model.args, 512, weights(model)).peak
    assert 0.5 * counted < measured_peak(model, 512) < counted


def test_kept_memory_grows_by_the_input_of_a_layer():
    few, many = (griffin(kinds, 128, 512) for kinds in ("rra", "rra" * 3))
    mx.eval(few.parameters(), many.parameters())
    grown = measured_peak(many, 512) - measured_peak(few, 512)
    kept = [lora_step(m.args, 512, weights(m)).kept for m in (few, many)]
    own = weights(many) - weights(few)
    assert grown < 1.2 * (kept[1] - kept[0]) + 1.5 * own


def test_2b_fits_a_16_gb_mac():
    """A row of 2,048 tokens over 4 bits a weight (1.7 GB with the recipe of convert)."""
    step = lora_step(PRESETS["2b"], 2048, 1_700_000_000)
    assert step.peak < 8e9
    assert step.head < step.layer
    assert lora_step(PRESETS["2b"], 4096, 1_700_000_000).peak < 8e9


def test_an_update_in_full_holds_nothing_of_before():
    """Weights, two moments, gradients: four arrays a weight, and what is at work."""
    model = griffin("rrarra", 256, 512)
    model.prepare_for_inference()
    ids = mx.arange(9)[None]
    batch = Batch(ids[:, :-1], ids[:, 1:], mx.ones((1, 8), mx.bool_))
    state = TrainingState(model, adamw(1e-4, weight_decay=0.1))
    loop = Loop(state, [batch] * 4, LoopSettings(iters=4), batch_loss, None, None)
    peaks = []
    for i in range(4):
        mx.synchronize()
        others = mx.get_active_memory() - (3 if i else 1) * weights(model)
        mx.reset_peak_memory()
        loop.step(i, update=True)
        mx.synchronize()
        peaks.append((mx.get_peak_memory() - others) / weights(model))
    assert max(peaks) < 4.75, peaks
