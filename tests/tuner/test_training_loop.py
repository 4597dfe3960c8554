"""The loop: losses, rules, exact resume, interruption."""

from __future__ import annotations

import json
import math
import os
import signal

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.assertions import relative_error
from helpers.models import golden_model
from mlx.utils import tree_flatten, tree_map

from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.tuner.config import TrainConfig
from mlx_rgemma.tuner.data.batches import ConcatDataset, DataLoader, PackedDataset
from mlx_rgemma.tuner.data.packing import Documents
from mlx_rgemma.tuner.dropout import add_dropout
from mlx_rgemma.tuner.ema import EMA
from mlx_rgemma.tuner.init import initial_a_param, initialize
from mlx_rgemma.tuner.loss import batch_loss
from mlx_rgemma.tuner.optim import adamw, learning_rate_schedule, use_weight_decay
from mlx_rgemma.tuner.train_state import TrainingState, load_state, save_state
from mlx_rgemma.tuner.trainer import Loop, LoopSettings, TrainingCallback, fit


def documents(count: int = 12) -> Documents:
    rng = np.random.default_rng(0)
    return Documents.of(
        [[2, *rng.integers(4, 60, int(n)).tolist(), 1] for n in rng.integers(6, 40, count)]
    )


def batches(batch_size: int = 2) -> DataLoader:
    return DataLoader(ConcatDataset(documents(), 16, seed=3), batch_size)


def new_state(*, dropout: float = 0.1, average: bool = True, steps: int = 12) -> TrainingState:
    model = golden_model("tiny-2b", fuse=False)
    initialize(model, seed=5)
    if dropout:
        add_dropout(model, dropout)
    optimizer = adamw(learning_rate_schedule(3e-3, steps, warmup=2), weight_decay=0.1)
    return TrainingState(model, optimizer, EMA(model, 0.9) if average else None)


def arrays(state: TrainingState) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in state.arrays().items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


SETTINGS = LoopSettings(iters=12, grad_accumulation_steps=2, max_grad_norm=1.0, steps_per_save=4)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, np.ndarray]:
    state = new_state()
    fit(state, batches(), SETTINGS, batch_loss)
    assert (state.progress.iteration, state.progress.updates) == (12, 6)
    return arrays(state)


@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(uninterrupted, stop, tmp_path):
    """Weights, moments, learning rate, average; with dropout and accumulation."""
    path = tmp_path / "checkpoint.safetensors"

    class Killed(Exception):
        pass

    def save(state):
        save_state(path, state, {"data": 1})
        if state.progress.iteration == stop:
            raise Killed

    with pytest.raises(Killed):
        fit(new_state(), batches(), SETTINGS, batch_loss, save=save)
    state = new_state()
    initialize(state.model, seed=77)  # what is resumed comes from the file alone
    load_state(path, state, {"data": 1})
    assert state.progress.iteration == stop
    fit(state, batches(), SETTINGS, batch_loss)
    assert same(arrays(state), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_after_its_update(uninterrupted, number, tmp_path):
    path = tmp_path / "checkpoint.safetensors"

    class Interrupt(TrainingCallback):
        def on_train_loss_report(self, train_info):
            if train_info["iteration"] == 5:
                os.kill(os.getpid(), number)

    settings = LoopSettings(**{**vars(SETTINGS), "steps_per_report": 1})
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        fit(
            new_state(),
            batches(),
            settings,
            batch_loss,
            save=lambda state: save_state(path, state, {}),
            callback=Interrupt(),
        )
    assert signal.getsignal(number) is handler
    state = new_state()
    load_state(path, state, {})
    assert state.progress.iteration == 6  # the update that iteration 5 had begun
    fit(state, batches(), SETTINGS, batch_loss)
    assert same(arrays(state), uninterrupted)


def test_accumulated_rows_are_one_larger_batch():
    """Unequal numbers of counted targets: the mean is over all of them."""
    rows = PackedDataset(documents(), 40, seed=1)
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = golden_model("tiny-2b", fuse=False)
        state = TrainingState(model, optim.SGD(0.1))
        settings = LoopSettings(iters=accumulation, grad_accumulation_steps=accumulation)
        fit(state, DataLoader(rows, size), settings, batch_loss)
        weights.append(dict(tree_flatten(model.parameters())))
        counts = {int(DataLoader(rows, 1)[i].mask.sum().item()) for i in range(4)}
        assert len(counts) > 1
    start = dict(tree_flatten(golden_model("tiny-2b").parameters()))
    for name in weights[0]:
        one, other = (np.array(w[name] - start[name], np.float64) for w in weights)
        assert relative_error(mx.array(other), one) < 2e-3, name


def test_a_row_costs_what_its_documents_cost_alone():
    model = golden_model("tiny-2b")
    docs = documents()
    packed, alone = PackedDataset(docs, 64, seed=0), PackedDataset(docs, 64, seed=0)
    alone.spans = [[span] for spans in packed.spans for span in spans]
    assert len(alone.spans) > len(packed.spans)

    def total(rows) -> float:
        losses = [batch_loss(model, DataLoader(rows, 1)[i])[0] for i in range(len(rows.spans))]
        return float(sum(losses).item())

    assert total(packed) == pytest.approx(total(alone), rel=2e-6)


def test_a_tiny_text_is_learned():
    model = golden_model("tiny-2b", fuse=False)
    initialize(model, seed=0)
    text = Documents.of([[2, *([7, 8, 9, 10, 11, 12] * 6), 1]])
    losses = []

    class Note(TrainingCallback):
        def on_train_loss_report(self, train_info):
            losses.append(train_info["train_loss"])

    settings = LoopSettings(iters=30, max_grad_norm=1.0, steps_per_report=1)
    state = TrainingState(model, adamw(3e-3, weight_decay=0.1))
    fit(state, DataLoader(PackedDataset(text, 38, 0), 1), settings, batch_loss, callback=Note())
    assert losses[0] > 3.5 and losses[-1] < 0.3


def test_bfloat16_computation_trains_float32_weights():
    """Two hundred updates in bfloat16, some gates saturated to a = 1: no value stops being one."""
    model = golden_model("tiny-2b", fuse=False, num_hidden_layers=3)
    initialize(model, seed=5)
    state = TrainingState(model, adamw(3e-3, weight_decay=0.1))
    layer = state.model.layers[0].temporal_block.rg_lru
    layer.recurrent_param = mx.where(mx.arange(layer.recurrent_param.size) < 4, -40.0, 0.0)
    first = float(batch_loss(state.model, batches()[0])[0].item())
    settings = LoopSettings(iters=200, max_grad_norm=1.0)
    fit(state, batches(1), settings, batch_loss, compute_dtype=mx.bfloat16)
    found = state.arrays()
    assert all(mx.isfinite(value).all() for value in found.values())
    assert {v.dtype for k, v in found.items() if k.startswith("model.")} == {mx.float32}
    assert float(batch_loss(state.model, batches()[0])[0].item()) < 0.5 * first


def test_an_exploding_loss_ends_the_run_with_one_line(tmp_path):
    state = new_state(average=False)
    state.model.model.final_norm.weight = mx.full(state.model.model.final_norm.weight.shape, np.nan)
    with pytest.raises(UserError, match="the loss became nan at iteration 1"):
        fit(state, batches(), SETTINGS, batch_loss)


def test_memory_does_not_grow_with_the_steps():
    state = new_state()
    loop = Loop(state, batches(), SETTINGS, batch_loss, None, None)
    held = []
    for i in range(40):
        loop.step(i, update=True)
        mx.synchronize()  # MLX's thread lets go of what it has used a moment after
        held.append(mx.get_active_memory())
    # Small arrays come and go; one more array of the model's at every step would be 4 kB or more.
    assert max(held[20:]) < max(held[:20]) + 40_000


def test_what_decays():
    model = golden_model("tiny-2b")
    chosen = {
        n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1]
        for n, v in tree_flatten(model.parameters())
        if use_weight_decay(n, v)
    }
    assert chosen == {
        f"{name}.weight"
        for name in (
            *("embed_tokens", "linear_x", "linear_y", "linear_out"),
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        )
    }


def test_weight_decay_reaches_nothing_else():
    """With no gradient and a learning rate of 1, decay alone changes the weights."""
    model = golden_model("tiny-2b")
    before = dict(tree_flatten(model.parameters()))
    optimizer = adamw(1.0, weight_decay=0.25)
    optimizer.update(model, tree_map(mx.zeros_like, model.parameters()))
    for name, value in tree_flatten(model.parameters()):
        factor = 0.75 if use_weight_decay(name, value) else 1.0
        assert mx.allclose(value, factor * before[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize(
    ("decay", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)]
)
def test_learning_rates(decay, middle):
    schedule = learning_rate_schedule(1.0, 110, warmup=10, decay=decay, end=0.1)
    rates = [float(schedule(mx.array(i)).item()) for i in (0, 4, 9, 10, 60, 110, 500)]
    end = 1.0 if decay == "constant" else 0.1
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, middle, end, end], abs=1e-6)


def test_the_recurrence_begins_between_its_bounds():
    a_param = initial_a_param((20_000,), mx.random.key(0))
    power = np.sort(np.exp(-8 * np.logaddexp(0, np.array(a_param, np.float64))))
    assert power[0] >= 0.9 and power[-1] <= 0.9991
    expected = np.linspace(0.9, 0.999, 20_000)
    assert np.abs(power - expected).max() < 0.002  # uniform


def test_initial_weights_have_their_scales():
    model = Model(TrainConfig(shape="small").model_config(vocab_size=1000))
    initialize(model, seed=0)
    spread = {
        name: math.sqrt(float(mx.square(value).mean().item()))
        for name, value in tree_flatten(model.parameters())
    }
    first, last = "model.layers.0.temporal_block.", "model.layers.11."
    expected = {
        "model.embed_tokens.weight": 512**-0.5,
        f"{first}linear_x.weight": 512**-0.5,
        f"{first}linear_out.weight": (6 * 512) ** -0.5,  # 2 / 12 layers of the variance
        f"{first}rg_lru.input_gate_weight": 64**-0.5,
        f"{first}conv_1d.weight": 0.5,
        f"{last}temporal_block.o_proj.weight": (6 * 512) ** -0.5,
        f"{last}mlp_block.down_proj.weight": (6 * 1536) ** -0.5,
        f"{first}linear_x.bias": 0.0,
        f"{first}rg_lru.recurrent_gate_bias": 0.0,
        "model.final_norm.weight": 0.0,
    }
    assert {name: spread[name] for name in expected} == pytest.approx(expected, rel=0.05)
    assert (
        model.layers[0].mlp_block.up_proj.weight != model.layers[1].mlp_block.up_proj.weight
    ).any()


def test_dropout_drops_its_share_and_keeps_names():
    model = golden_model("tiny-2b", fuse=False)
    names = [name for name, _ in tree_flatten(model.parameters())]
    tokens = mx.arange(4, 44)[None]
    model.eval()
    plain = model(tokens)
    add_dropout(model, 0.5)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    model.eval()
    assert (model(tokens) == plain).all()
    model.train()
    mx.random.seed(0)
    one, two = model(tokens), model(tokens)
    mx.random.seed(0)
    again = model(tokens)
    assert (one == again).all() and not (one == two).all()
    x = model.model.embed_tokens(mx.zeros((1, 4000), mx.int32))
    dropped = float((x[0, :, 0] == 0).mean().item())
    assert 0.46 < dropped < 0.54 and set(np.unique(np.array(x[0, :, 0]))) == {
        0.0,
        2.0 * float(model.model.embed_tokens.weight[0, 0].item()),
    }


def test_the_average_forgets_its_beginning():
    model = golden_model("tiny-2b")
    average = EMA(model, 0.99)
    start = {name: np.array(value) for name, value in average.weights.items()}
    expected = dict(start)
    for n in range(1, 6):
        model.model.final_norm.weight = mx.full((model.args.hidden_size,), float(n))
        average.update(model, n)
        d = min(0.99, (1 + n) / (10 + n))
        name = "model.final_norm.weight"
        expected[name] = d * expected[name] + (1 - d) * n
    with average.applied(model):
        found = np.array(model.model.final_norm.weight)
    np.testing.assert_allclose(found, expected["model.final_norm.weight"], rtol=1e-6)
    assert (model.model.final_norm.weight == 5).all()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    state = new_state()
    Loop(state, batches(), SETTINGS, batch_loss, None, None).step(0, update=True)
    save_state(path, state, {"texts": ["abc"], "seed": 1})
    return path


def test_a_checkpoint_of_other_settings_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"a run with seed = 1, this one has 2"):
        load_state(checkpoint, new_state(), {"texts": ["abc"], "seed": 2})


def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    model = golden_model("tiny-9b", fuse=False)
    state = TrainingState(model, adamw(1e-3, weight_decay=0.1), EMA(model, 0.9))
    with pytest.raises(CheckpointError, match="here"):
        load_state(checkpoint, state, {"texts": ["abc"], "seed": 1})


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(checkpoint, keep):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[:keep])
    state = new_state()
    before = arrays(state)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
        load_state(checkpoint, state, {"texts": ["abc"], "seed": 1})
    assert same({k: v for k, v in arrays(state).items() if k in before}, before)


def test_a_flipped_bit_in_a_checkpoint_is_found(checkpoint):
    data = bytearray(checkpoint.read_bytes())
    data[-5] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its checksum is"):
        load_state(checkpoint, new_state(), {"texts": ["abc"], "seed": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"progress": None},
        {"progress": "[" * 100_000},
        {"progress": "3"},
        {"progress": '{"iteration": -1}'},
        {"progress": '{"iteration": 1e400}'},
        {"progress": '{"iteration": ' + "9" * 5000 + "}"},
        {"progress": '{"iteration": true}'},
        {"progress": '{"recent_loss": NaN}'},
        {"progress": '{"speed": 3}'},
        {"fingerprint": "[]"},
        {"fingerprint": "{"},
        {"fingerprint": None},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_damaged_metadata_of_a_checkpoint_is_one_line(checkpoint, changes):
    loaded, metadata = mx.load(str(checkpoint), return_metadata=True)
    mx.eval(loaded)
    metadata = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
    mx.save_safetensors(str(checkpoint), loaded, metadata)
    with pytest.raises(CheckpointError, match="its metadata is damaged"):
        load_state(checkpoint, new_state(), {"texts": ["abc"], "seed": 1})


def test_settings_of_a_checkpoint_are_shown_in_part(checkpoint):
    loaded, metadata = mx.load(str(checkpoint), return_metadata=True)
    mx.eval(loaded)
    metadata["fingerprint"] = json.dumps({"\x1b[2J": "x" * 100_000})
    mx.save_safetensors(str(checkpoint), loaded, metadata)
    with pytest.raises(UserError, match="was written by a run with") as error:
        load_state(checkpoint, new_state(), {})
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_a_model_is_no_checkpoint(checkpoint):
    mx.save_safetensors(str(checkpoint), {"a": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="not a checkpoint of a training run"):
        load_state(checkpoint, new_state(), {})


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(checkpoint, monkeypatch):
    data = checkpoint.read_bytes()

    def full_disk(path, *_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise RuntimeError("[write] Unable to write 10820 bytes")

    monkeypatch.setattr(mx, "save_safetensors", full_disk)
    with pytest.raises(CheckpointError, match="Unable to write"):
        save_state(checkpoint, new_state(), {})
    assert checkpoint.read_bytes() == data
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
