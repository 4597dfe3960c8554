"""The state: fixed size, mlx-lm's protocol, exact under anything done to a batch."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.emulated import IMPLEMENTATIONS, run_by
from helpers.models import golden_model
from helpers.random_models import SMALL

from mlx_rgemma import GriffinConfig, Model
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.cache import AttentionCache, RecurrentCache, state_nbytes
from mlx_rgemma.io import memory


def small_model(**changes) -> Model:
    values = {"vocab_size": 50, "attention_window_size": 6, **SMALL}
    model = Model(GriffinConfig(**{**values, **changes}))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(("preset", "megabytes"), [("2b", 17.2), ("9b", 26.2)])
def test_bytes_of_the_released_models_are_known_before_the_first_token(preset, megabytes):
    config = GriffinConfig.preset(preset)
    model = Model(config)  # lazy: no weight is ever computed
    model.set_dtype(mx.bfloat16)
    assert round(state_nbytes(model.make_cache()) / 1e6, 1) == megabytes


def test_bytes_never_change(model_name):
    model = golden_model(model_name)
    cache = model.make_cache()
    expected = state_nbytes(cache)
    c = model.args
    recurrent = 4 * c.lru_width * (1 + c.conv1d_width - 1)
    attention = 4 * 2 * (c.attention_window_size + 1) * c.head_dim
    kinds = c.layer_types
    assert expected == sum(recurrent if k == "recurrent" else attention for k in kinds)
    for size in (1, 1, 50, 1, 3, 200, 1):
        model(mx.ones((1, size), mx.int32), cache=cache)
        mx.eval([layer.state for layer in cache])
        assert state_nbytes(cache) == expected


def test_a_state_beyond_memory_is_refused_before_it_is_allocated(monkeypatch):
    """MLX does not look at what `malloc` gives it: the process would end by a signal."""
    model = small_model(attention_window_size=1 << 25)  # 4 GB a sequence
    monkeypatch.setattr(memory, "available_memory", lambda: 5_000_000_000)
    cache = model.make_cache()
    message = r"the state of 3 sequences needs 12\.88 GB of memory, 5\.00 GB are available; use"
    with pytest.raises(UserError, match=message):
        model.make_cache(3)
    with pytest.raises(UserError, match=message):
        model(mx.zeros((3, 2), mx.int32), cache=cache)
    assert [layer.batch_size for layer in cache] == [1, 1, 1]
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert len(model.make_cache(3)) == 3


def test_a_window_beyond_this_machine_is_refused():
    model = small_model(attention_window_size=1 << 25)
    with pytest.raises(UserError, match=r"needs .* GB of memory, .* GB are available; use fewer"):
        model.make_cache(1 << 16)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoding_writes_the_ring_in_place(implementation, training):
    """A step needs less memory than a copy of the ring would take."""
    with run_by(implementation, "decode_attention"):
        for rows in (1, 3):
            decode_in_place(rows, training)


def decode_in_place(rows: int, training: bool) -> None:
    model = small_model(attention_window_size=20_000).train(training)
    cache = model.make_cache(rows)
    ring_bytes = max(layer.nbytes for layer in cache)
    token = model(mx.zeros((rows, 5), mx.int32), cache=cache)[:, -1:].argmax(axis=-1)
    mx.eval(token, [layer.state for layer in cache])
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(12):
        token = model(token, cache=cache)[:, -1:].argmax(axis=-1)
        mx.eval(token)
    assert mx.get_peak_memory() - before < ring_bytes / 2


@pytest.mark.parametrize("rows", [1, 4])
def test_decoding_leaves_nothing_behind(rows):
    """After many steps as much memory is in use as after few: no array, no graph is kept."""
    model = small_model()
    cache = model.make_cache(rows)
    token = mx.zeros((rows, 1), mx.int32)

    def active_after(steps: int) -> int:
        nonlocal token
        for _ in range(steps):
            token = model(token, cache=cache)[:, -1:].argmax(axis=-1)
            mx.eval(token)
        mx.eval([layer.state for layer in cache])
        return mx.get_active_memory()

    few = active_after(20)
    # A single number kept at each step would be 2,400 bytes.
    assert active_after(600) - few < 1024


def test_prefill_memory_is_bounded_by_the_chunk():
    model = small_model()
    peaks = []
    for chunks in (4, 40):
        cache = model.make_cache()
        mx.clear_cache()
        mx.reset_peak_memory()
        for _ in range(chunks):
            model(mx.ones((1, 64), mx.int32), cache=cache)
            mx.eval([layer.state for layer in cache])
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 1.02 * peaks[0]


class Alone:
    """A sequence run by itself: what every row of a batch must equal."""

    def __init__(self, model: Model) -> None:
        self.model, self.tokens = model, []

    def feed(self, tokens: list[int]) -> np.ndarray:
        """Logits after the last of the tokens, from one plain pass over everything so far."""
        self.tokens = self.tokens + tokens
        return np.array(self.model(mx.array([self.tokens]))[0, -1])


def prefill(model: Model, cache, prompts: list[list[int]], step: int) -> np.ndarray:
    """mlx-lm's way with right-padded prompts; returns each row's last logits."""
    lengths = [len(p) for p in prompts]
    longest = max(lengths)
    padding = [longest - n for n in lengths]
    tokens = np.array([p + [0] * n for p, n in zip(prompts, padding, strict=True)])
    if any(padding):
        for layer in cache:
            layer.prepare(lengths=lengths, right_padding=padding)
    logits = []
    for at in range(0, longest, step):
        logits.append(np.array(model(mx.array(tokens[:, at : at + step]), cache=cache)))
        mx.eval([layer.state for layer in cache])
    if any(padding):
        for layer in cache:
            layer.finalize()
    logits = np.concatenate(logits, axis=1)
    return np.stack([logits[row, n - 1] for row, n in enumerate(lengths)])


@pytest.mark.parametrize("seed", range(12))
def test_rows_come_and_go(seed):
    """Random joins, leaves, copies, ragged prompts and steps: each row is what it is alone."""
    rng = np.random.default_rng(seed)
    rule = ("google", "hf")[seed % 2]
    model = golden_model(("tiny-2b", "tiny-9b", "tiny-sharded")[seed % 3], window=rule)

    def random_tokens(n: int) -> list[int]:
        return rng.integers(3, 90, n).tolist()

    def start() -> tuple[list, list[Alone]]:
        count = int(rng.integers(1, 4))
        rows = [Alone(model) for _ in range(count)]
        singles = [model.make_cache() for _ in range(count)]
        return [type(c[0]).merge(list(c)) for c in zip(*singles, strict=True)], rows

    cache, rows = start()
    for _ in range(14):
        action = rng.choice(["prompt", "steps", "join", "leave", "copy", "extract"])
        if action == "prompt":
            prompts = [random_tokens(int(rng.choice([1, 2, 3, 9, 20, 40]))) for _ in rows]
            logits = prefill(model, cache, prompts, int(rng.choice([1, 2, 5, 16, 64])))
            expected = [row.feed(p) for row, p in zip(rows, prompts, strict=True)]
            assert max_error(logits, np.stack(expected)) < LOGITS_ATOL
        elif action == "steps":
            for _ in range(int(rng.integers(1, 6))):
                tokens = random_tokens(len(rows))
                logits = np.array(model(mx.array(tokens)[:, None], cache=cache))[:, 0]
                expected = [row.feed([t]) for row, t in zip(rows, tokens, strict=True)]
                assert max_error(logits, np.stack(expected)) < LOGITS_ATOL
        elif action == "join" and len(rows) < 8:
            others, more = start()
            prompts = [random_tokens(int(rng.integers(1, 30))) for _ in more]
            prefill(model, others, prompts, 7)
            for row, prompt in zip(more, prompts, strict=True):
                row.feed(prompt)
            for layer, other in zip(cache, others, strict=True):
                layer.extend(other)
            rows = rows + more
        elif action == "leave" and len(rows) > 1:
            keep = sorted(rng.choice(len(rows), len(rows) - 1, replace=False).tolist())
            for layer in cache:
                layer.filter(keep)
            rows = [rows[i] for i in keep]
        elif action == "copy":
            untouched, cache = cache, copy.deepcopy(cache)
            tokens = mx.array(random_tokens(len(rows)))[:, None]
            model(tokens, cache=untouched)  # must not reach the copy
        elif action == "extract":
            singles = [[layer.extract(i) for layer in cache] for i in range(len(rows))]
            cache = [type(c[0]).merge(list(c)) for c in zip(*singles, strict=True)]


def test_state_round_trips_through_mlx_lm(tmp_path):
    """mlx-lm's own prompt-cache files hold our caches once the class is registered."""
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

    from mlx_rgemma import register

    register()
    model = golden_model("tiny-sharded")
    cache = model.make_cache()
    model(mx.arange(3, 33)[None], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    tokens = mx.array([[5, 6, 7]])
    expected = np.array(model(tokens, cache=cache))
    assert np.array_equal(np.array(model(tokens, cache=loaded)), expected)


def test_huge_positions_survive_a_round_trip():
    cache = RecurrentCache(8, 4, mx.float32)
    cache.positions = [2**40]
    assert RecurrentCache.from_state(cache.state).positions == [2**40]


@pytest.mark.parametrize(
    "state",
    [
        (mx.zeros((1, 8)), mx.zeros((1, 3, 9)), mx.array([0])),
        (mx.zeros((1, 8), mx.float16), mx.zeros((1, 3, 8)), mx.array([0])),
        (mx.zeros((1, 8)), mx.zeros((2, 3, 8)), mx.array([0])),
        (mx.zeros((1, 8)), mx.zeros((1, 3, 8)), mx.array([0, 0])),
        (mx.zeros((1, 8)), mx.zeros((1, 3, 8)), mx.array([-1])),
        (mx.zeros((1, 8)), mx.zeros((1, 3, 8)), mx.array([2**62 + 1], mx.int64)),
        (mx.zeros((1, 8)), mx.zeros((1, 3, 8), mx.int32), mx.array([0])),
        (mx.zeros((1, 8)), mx.zeros((1, 3, 8))),
        None,
    ],
    ids=["width", "dtype", "rows", "positions", "negative", "huge", "integers", "short", "none"],
)
def test_recurrent_state_is_checked(state):
    with pytest.raises(ValueError, match="recurrent block"):
        RecurrentCache.from_state(state)


@pytest.mark.parametrize(
    "state",
    [
        (mx.zeros((1, 2, 5, 8)), mx.array([0, 5]), mx.array([0])),
        (mx.zeros((1, 1, 6, 8)), mx.array([0, 5]), mx.array([0])),
        (mx.zeros((1, 2, 6, 8)), mx.array([6, 5]), mx.array([0])),
        (mx.zeros((1, 2, 6, 8)), mx.array([-1, 5]), mx.array([0])),
        (mx.zeros((1, 2, 6, 8)), mx.array([0, 5]), mx.array([1.5])),
        (mx.zeros((1, 2, 6, 8), mx.uint8), mx.array([0, 5]), mx.array([0])),
        ("kv", mx.array([0, 5]), mx.array([0])),
    ],
    ids=["slots", "no values", "head", "negative head", "positions", "dtype", "no array"],
)
def test_attention_state_is_checked(state):
    with pytest.raises(ValueError, match="attention block"):
        AttentionCache.from_state(state)


def test_a_cache_of_another_model_is_refused(model_name):
    model = golden_model(model_name)
    tokens = mx.array([[5, 6]])
    for changes in ({"attention_window_size": 5}, {"window": "hf"}, {"num_hidden_layers": 4}):
        other = golden_model(model_name, **changes).make_cache()
        with pytest.raises(ValueError, match=r"\[cache\]"):
            model(tokens, cache=other)
    with pytest.raises(ValueError, match="needs a recurrent state"):
        model(tokens, cache=[None] * len(model.layers))


def test_a_used_cache_keeps_its_rows():
    model = golden_model("tiny-2b")
    cache = model.make_cache()
    model(mx.array([[5, 6]]), cache=cache)
    with pytest.raises(ValueError, match="holds 1 sequences, the tokens 2"):
        model(mx.array([[5], [6]]), cache=cache)


def test_caches_claim_no_trim():
    for layer in golden_model("tiny-2b").make_cache():
        assert not layer.is_trimmable()


def test_left_padding_is_refused():
    with pytest.raises(ValueError, match="right"):
        RecurrentCache(8, 4, mx.float32).prepare(lengths=[1], left_padding=[2])
