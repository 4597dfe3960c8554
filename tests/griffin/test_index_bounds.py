"""Every number of the Python API that becomes an index of MLX, which checks none of them.

Fields of requests are tested in tests/serving.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import ON_GPU, max_error
from helpers.random_models import CONFIG, random_model

from mlx_rgemma import Session, batch_generate, generate, load
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.cache import AttentionCache, RecurrentCache
from mlx_rgemma.griffin.checks import UNCHECKED_TOKENS
from mlx_rgemma.ops.cross_entropy import cross_entropies

SIZE = CONFIG.vocab_size
LONG = UNCHECKED_TOKENS + 1


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def loaded():
    return load()


# Token ids that come from the host: refused by name, before anything is computed.

UNKNOWN_IDS = {
    "negative": [5, -1],
    "the first too large": [2048],
    "beyond int32": [5, 2**31],
    "beyond int64": [10**30],
    "array, negative": mx.array([-3]),
    "int64 array": mx.array([2**33], mx.int64),
    "NumPy": np.array([5, 1 << 20]),
}
NO_IDS = {
    "a float": [1.5],
    "a boolean": [True],
    "text": ["5"],
    "nested": [[5]],
    "array of floats": mx.array([1.0, 2.0]),
}
READERS = {
    "generate": lambda model, tokenizer, ids: generate(model, tokenizer, ids, max_tokens=1),
    "batch_generate": lambda model, tokenizer, ids: batch_generate(
        model, tokenizer, [[5], ids], max_tokens=1
    ),
    "feed": lambda model, tokenizer, ids: Session(model, tokenizer).feed(ids),
    "stream": lambda model, tokenizer, ids: list(Session(model, tokenizer).stream(ids)),
}


@pytest.mark.parametrize("ids", UNKNOWN_IDS.values(), ids=UNKNOWN_IDS)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_unknown_ids_are_refused(loaded, read, ids):
    with pytest.raises(UserError, match=r"holds token .*; the model knows 0 to 2047\.$"):
        read(*loaded, ids)


@pytest.mark.parametrize("ids", NO_IDS.values(), ids=NO_IDS)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_values_that_are_no_ids_are_refused(loaded, read, ids):
    with pytest.raises(UserError, match=r"^the prompt.*: expected a text, token ids, or a list"):
        read(*loaded, ids)


@pytest.mark.parametrize("ids", [[5, 2047], mx.array([5, 2047], mx.uint16), np.array([5, 2047])])
def test_known_ids_of_any_kind_are_read(loaded, ids):
    assert Session(*loaded).feed(ids).tokens == 2


# Token ids on the device.

CALLS = {
    "call": lambda model, tokens: model(tokens),
    "with a state": lambda model, tokens: model(tokens, cache=model.make_cache()),
    "last_logits": lambda model, tokens: model.last_logits(tokens, model.make_cache()),
    "prefill": lambda model, tokens: model.prefill(tokens, model.make_cache()),
}


@pytest.mark.parametrize("token", [-1, SIZE, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_chunks_are_checked(model, call, token):
    with pytest.raises(UserError, match=rf"holds token {token}; the model knows 0 to {SIZE - 1}"):
        call(model, mx.array([[3] * (LONG - 1) + [token]]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bool_])
@pytest.mark.parametrize("length", [1, LONG])
def test_tokens_are_integers(model, dtype, length):
    with pytest.raises(UserError, match="expected integers"):
        model(mx.zeros((1, length), dtype))


WRONG_ON_DEVICE = [
    *((token, mx.int32) for token in (-1, SIZE, 2**31 - 1, -(2**31))),
    *((token, mx.int64) for token in (-1, SIZE, 2**40, -(2**40), 2**32 + 3)),
    *((token, mx.uint32) for token in (SIZE, 2**32 - 1)),
    (2**64 - 1, mx.uint64),
    (-1, mx.int8),
    (SIZE, mx.uint8),
    (2**16 - 1, mx.uint16),
]


@pytest.mark.parametrize(("token", "dtype"), WRONG_ON_DEVICE, ids=str)
def test_ids_of_a_decode_step_stay_within_the_embedding(model, token, dtype):
    """They are not read, so as not to wait for them, and count as the last of the vocabulary."""
    array = mx.array(np.array([[3, token]], str(dtype).removeprefix("mlx.core.")))
    expected = np.array(model(mx.array([[3, SIZE - 1]])))
    assert max_error(model(array), expected) == 0
    embed = mx.compile(lambda tokens: model.model(tokens))
    long = mx.concatenate([mx.full((1, LONG), 3, array.dtype), array[:, 1:]], axis=1)
    last = mx.array([[3] * LONG + [SIZE - 1]])
    assert max_error(embed(long), np.array(model.model(last))) < 1e-4


@pytest.mark.skipif(ON_GPU or sys.platform != "linux", reason="the CPU backend is Linux only")
@pytest.mark.parametrize("token", [-1, SIZE, 2**31 - 1])
def test_the_decoder_checks_its_ids(monkeypatch, token):
    from mlx_rgemma.cpu import decode_step

    monkeypatch.setattr(decode_step, "MIN_WEIGHTS", 1)
    model = random_model()
    model.prepare_for_inference()
    cache = model.make_cache()
    model(mx.array([[3, 4]]), cache=cache)
    before = cache[0].positions
    with pytest.raises(UserError, match=f"holds token {token}"):
        model(mx.array([[token]]), cache=cache)
    assert cache[0].positions == before


@pytest.mark.parametrize("position", [-1, -(2**40), 2**63 - 1])
@pytest.mark.parametrize("length", [1, LONG])
@pytest.mark.parametrize("with_state", [False, True])
def test_positions_are_checked(model, position, length, with_state):
    cache = model.make_cache() if with_state else None
    positions = mx.array([[position] * length], mx.int64)
    with pytest.raises(UserError, match=f"segment_pos holds {position}, expected 0 to"):
        model(mx.full((1, length), 3), cache=cache, segment_pos=positions)


def test_positions_are_integers(model):
    with pytest.raises(UserError, match=r"segment_pos is .*float32, expected integers"):
        model(mx.array([[3, 4]]), segment_pos=mx.array([[0.0, 1.0]]))


def test_positions_within_a_compiled_function(model):
    """They cannot be read there: a negative one counts as 0."""
    run = mx.compile(lambda tokens, positions: model(tokens, segment_pos=positions))
    tokens = mx.array([[3, 4, 5, 6]])
    found = run(tokens, mx.array([[-7, 1, 2, -1]]))
    assert max_error(found, np.array(run(tokens, mx.array([[0, 1, 2, 0]])))) < 1e-5


# Rows of a state.


def states(model):
    """One cache of each kind, of three sequences that have begun."""
    cache = model.make_cache(3)
    model(mx.array([[3, 4], [5, 6], [7, 8]]), cache=cache)
    kinds = {type(layer): layer for layer in cache}
    assert kinds.keys() == {RecurrentCache, AttentionCache}
    return kinds.values()


WRONG_ROWS = [3, -1, 2**31, -(2**40), 1.0, True, "0", None, [0]]


@pytest.mark.parametrize("row", WRONG_ROWS, ids=str)
def test_sequences_out_of_range_are_refused(model, row):
    for layer in states(model):
        before = [np.array(array) for array in layer.state]
        with pytest.raises(ValueError, match=r"\[cache\] sequence"):
            layer.extract(row)
        with pytest.raises(ValueError, match=r"\[cache\] sequence"):
            layer.filter([0, row])
        for array, kept in zip(layer.state, before, strict=True):
            assert np.array_equal(np.array(array), kept)


@pytest.mark.parametrize("rows", [mx.array([2, 0]), np.array([2, 0]), (2, 0)], ids=type)
def test_rows_in_an_array(model, rows):
    for layer in states(model):
        layer.filter(rows)
        assert layer.batch_size == 2
    with pytest.raises(ValueError, match="sequence is"):
        next(iter(states(model))).filter(mx.array([True, False, True]))


@pytest.mark.parametrize("length", [-1, -(2**40), 1.5, "3", None, True], ids=str)
def test_lengths_of_prompts(model, length):
    for layer in states(model):
        with pytest.raises(ValueError, match=r"\[cache\] a prompt's length is"):
            layer.prepare(lengths=[1, length, 2])
        assert layer.lengths is None


@pytest.mark.parametrize("lengths", [[], [1, 2], [1, 2, 3, 4]], ids=len)
def test_lengths_of_other_rows(model, lengths):
    for layer in states(model):
        with pytest.raises(ValueError, match=r"\[cache\] the cache holds 3 sequences"):
            layer.prepare(lengths=lengths)
        assert layer.lengths is None


@pytest.mark.parametrize("tokens", [-1, 3, 2**40, 1.0, "1", None, True], ids=str)
def test_tokens_taken_back(model, tokens):
    cache = model.make_cache()
    for layer in cache:
        layer.enable_rollback(4)
    model(mx.array([[3, 4]]), cache=cache)
    for layer in cache:
        with pytest.raises(ValueError, match=r"\[cache\] "):
            layer.trim(tokens)
        assert layer.positions == [2]


@pytest.mark.parametrize("tokens", [-1, 1.5, "4", None, 2**70], ids=str)
def test_tokens_kept(model, tokens):
    for layer in states(model):
        with pytest.raises(ValueError, match=r"\[cache\] "):
            layer.enable_rollback(tokens)


def test_states_of_different_models(model):
    other = random_model(config=CONFIG.with_window("hf"))
    for mine, theirs in zip(states(model), states(other), strict=True):
        wrong = [next(s for s in states(model) if type(s) is not type(mine)), None, 3]
        if isinstance(mine, AttentionCache):
            wrong.append(theirs)
        for stranger in wrong:
            with pytest.raises(ValueError, match="only caches of the same model"):
                mine.extend(stranger)
            with pytest.raises(ValueError, match="only caches of the same model"):
                type(mine).merge([mine, stranger])
        with pytest.raises(ValueError, match="only caches of the same model"):
            type(mine).merge([])


@pytest.mark.parametrize("rows", [0, -1, 1.5, "2", None, 2**31, 2**62, 2**70], ids=str)
def test_rows_of_a_new_state(model, rows):
    with pytest.raises(ValueError, match="batch_size is"):
        model.make_cache(rows)


def test_layers_of_different_rows(model):
    """A kernel would read beyond the ring of fewer rows."""
    cache = model.make_cache(2)
    model(mx.array([[3, 4], [5, 6]]), cache=cache)
    cache[-1].filter([0])
    for length in (1, LONG):
        with pytest.raises(ValueError, match="the cache holds 1 sequences"):
            model(mx.full((2, length), 3), cache=cache)


WRONG_STATES = {
    "a negative position": (0, [-1, 2, 2]),
    "a position beyond int64": (0, [2**63 - 1, 2, 2]),
    "too few positions": (0, [2, 2]),
    "a slot beyond the ring": (1, [CONFIG.past_window + 1, CONFIG.past_window]),
    "a negative slot": (1, [-1, CONFIG.past_window]),
    "another window": (1, [0, CONFIG.past_window + 1]),
}


@pytest.mark.parametrize(("number", "values"), WRONG_STATES.values(), ids=WRONG_STATES)
def test_states_from_files(model, number, values):
    for layer in states(model):
        *arrays, positions = layer.state
        if number == 1:
            if isinstance(layer, RecurrentCache):
                continue
            state = (arrays[0], mx.array(values, mx.int64), positions)
        else:
            state = (*arrays, mx.array(values, mx.int64))
        with pytest.raises(ValueError, match="not the state of"):
            type(layer).from_state(state)
    for layer in states(model):
        *arrays, positions = layer.state
        at = 0 if isinstance(layer, AttentionCache) else 1
        arrays[at] = arrays[at].astype(mx.int32)
        with pytest.raises(ValueError, match="not the state of"):
            type(layer).from_state((*arrays, positions))


def test_states_given_to_a_batch(loaded):
    model, tokenizer = loaded
    begun = model.make_cache(2)
    wrong = {
        "1 prompt_caches for 2 prompts": [model.make_cache()],
        "state of one sequence": [model.make_cache(), begun],
        "the model has 6 layers": [model.make_cache(), model.make_cache()[1:]],
        "layer 0 needs": [model.make_cache(), model.make_cache()[::-1]],
    }
    for message, caches in wrong.items():
        with pytest.raises(UserError, match=message):
            batch_generate(model, tokenizer, [[5], [6]], max_tokens=1, prompt_caches=caches)


# Targets and stop tokens.


@pytest.mark.parametrize(("token", "dtype"), WRONG_ON_DEVICE, ids=str)
@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_targets_stay_within_the_scores(token, dtype, cap):
    """MLX would write the gradient beyond them."""
    scores = mx.random.normal((2, SIZE), key=mx.random.key(1))
    array = mx.array(np.array([3, token], str(dtype).removeprefix("mlx.core.")))
    run = mx.value_and_grad(lambda s, t: cross_entropies(s, t, cap).sum())
    for found, expected in zip(
        run(scores, array), run(scores, mx.array([3, SIZE - 1])), strict=True
    ):
        assert max_error(found, np.array(expected)) == 0
    logits = cap * mx.tanh(scores / cap) if cap else scores
    loss = nn.losses.cross_entropy(logits, mx.array([3, SIZE - 1])).sum()
    assert abs((run(scores, array)[0] - loss).item()) < 1e-5


def test_stop_tokens_beyond_the_vocabulary_are_no_index_of_the_sampler(loaded, monkeypatch):
    """A vocabulary may have been cut; mlx-lm's XTC writes to the places of the stop tokens."""
    import mlx_lm.sample_utils

    from mlx_rgemma import chat

    given = {}
    monkeypatch.setattr(mlx_lm.sample_utils, "make_sampler", lambda *_, **more: given.update(more))
    model, tokenizer = loaded
    monkeypatch.setattr(type(tokenizer), "eos_token_ids", {1, 107, 2048, 10**9})
    args = chat.build_parser().parse_args(["--xtc-probability", "0.5", "--temp", "1"])
    chat.Chat(args, model, tokenizer)
    assert {1, 107} <= set(given["xtc_special_tokens"])
    assert max(given["xtc_special_tokens"]) < 2048
