"""The loop of plain decoding: what it reads, when it hands out a token, what the state has seen."""

from __future__ import annotations

import io

import mlx.core as mx
import pytest
from helpers.random_models import SHAPE, random_model

from mlx_rgemma import GriffinConfig, Session, load
from mlx_rgemma.cpu.layers import Linear
from mlx_rgemma.generation import decode as decoding
from mlx_rgemma.generation import speculative as speculation
from mlx_rgemma.generation.api import stream_generate
from mlx_rgemma.generation.decode import Processors, generate_step
from mlx_rgemma.griffin.layers import LocalAttentionBlock, RecurrentBlock

PROMPT = mx.array([2, *range(40, 80)])


@pytest.fixture(scope="module")
def embedded():
    return load()


class Counted:
    """A model that notes what it reads."""

    def __init__(self, model) -> None:
        self.model = model
        self.lengths: list[int] = []

    def prefill(self, tokens, cache):
        self.lengths.append(tokens.shape[1])
        self.model.prefill(tokens, cache)

    def last_logits(self, tokens, cache):
        self.lengths.append(tokens.shape[1])
        return self.model.last_logits(tokens, cache)


@pytest.mark.parametrize(
    "size, chunks", [(2048, [41]), (41, [41]), (40, [40, 1]), (15, [15, 15, 11])]
)
def test_the_first_token_comes_with_the_last_chunk(embedded, size, chunks):
    counted, calls = Counted(embedded[0]), []
    steps = generate_step(
        PROMPT,
        counted,
        prompt_cache=embedded[0].make_cache(),
        max_tokens=3,
        prefill_step_size=size,
        prompt_progress_callback=lambda done, total: calls.append((done, total)),
    )
    next(steps)
    assert counted.lengths == chunks
    next(steps)
    assert counted.lengths == [*chunks, 1, 1]
    assert calls == [(sum(chunks[:i]), 41) for i in range(len(chunks) + 1)]


@pytest.mark.parametrize("handed_out", [1, 2, 5])
@pytest.mark.parametrize("closed", [True, False])
def test_the_state_has_read_what_was_handed_out(embedded, handed_out, closed):
    model, _ = embedded
    cache = model.make_cache()
    most = 20 if closed else handed_out
    steps = generate_step(PROMPT, model, prompt_cache=cache, max_tokens=most)
    tokens = [next(steps)[0] for _ in range(handed_out)]
    steps.close() if closed else list(steps)
    assert {layer.offset for layer in cache} == {PROMPT.size + handed_out}
    going_on = [
        t for t, *_ in generate_step(mx.array([5]), model, prompt_cache=cache, max_tokens=6)
    ]
    again = mx.concatenate([PROMPT, mx.array([*tokens, 5])])
    at_once = generate_step(again, model, prompt_cache=model.make_cache(), max_tokens=6)
    assert going_on == [t for t, *_ in at_once]


def test_tokens_and_probabilities_are_mlx_lms(embedded):
    from mlx_lm.generate import generate_step as mlx_lm_steps

    model, _ = embedded
    theirs = list(mlx_lm_steps(PROMPT, model, max_tokens=30, prefill_step_size=16))
    ours = list(
        generate_step(
            PROMPT, model, prompt_cache=model.make_cache(), max_tokens=30, prefill_step_size=16
        )
    )
    assert [token for token, *_ in ours] == [token for token, _ in theirs]
    for (_, found, drafted), (_, expected) in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape and not drafted
        assert mx.allclose(found, expected, atol=5e-5)


def test_processors_see_prompt_and_text(embedded):
    seen = []

    def note(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    model, tokenizer = embedded
    answers = stream_generate(
        model, tokenizer, PROMPT, 3, logits_processors=[note], prefill_step_size=16
    )
    tokens = [answer.token for answer in answers]
    assert seen[0] == PROMPT.tolist()
    assert seen[2] == PROMPT.tolist() + tokens[:2]


def test_a_session_hands_out_the_first_token_before_it_begins_the_next(embedded, monkeypatch):
    """Evaluating both at once would double the time to the first token."""
    model, tokenizer = embedded
    going_on = Session(model, tokenizer)
    going_on.feed(PROMPT)
    events = []
    read, evaluate = type(model).last_logits, mx.eval
    monkeypatch.setattr(type(model), "last_logits", lambda *a: (events.append("step"), read(*a))[1])
    monkeypatch.setattr(mx, "eval", lambda *a: (events.append("eval"), evaluate(*a))[1])
    stream = going_on.stream(max_tokens=5)
    next(stream)
    assert events.count("step") == 1 and events[-1] == "eval"
    next(stream)
    assert events.count("step") == 3


def test_a_session_takes_no_step_for_its_last_token(embedded, monkeypatch):
    """It stays pending: the next stream reads it."""
    model, tokenizer = embedded
    going_on = Session(model, tokenizer)
    steps = []
    read = type(model).last_logits
    monkeypatch.setattr(
        type(model), "last_logits", lambda *a: (steps.append(a[1].shape), read(*a))[1]
    )
    for most in (1, 2, 5):
        steps.clear()
        tokens = [answer.token for answer in going_on.stream(PROMPT, max_tokens=most)]
        assert steps == [(1, 1)] * most and going_on.last_token == tokens[-1]


@pytest.mark.parametrize("loop", ["plain", "session", "speculation"])
def test_a_processor_that_looks_at_no_tokens_leaves_no_graph(embedded, monkeypatch, loop):
    made = []

    class Noted(Processors):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    modules = {"plain": decoding, "session": decoding, "speculation": speculation}
    monkeypatch.setattr(modules[loop], "Processors", Noted)
    options = {"max_tokens": 40, "logits_processors": [lambda tokens, logits: logits]}
    if loop == "session":
        answers = Session(*embedded).stream(PROMPT, **options)
    else:
        lookup = 2 if loop == "speculation" else 0
        answers = stream_generate(*embedded, PROMPT, prompt_lookup=lookup, **options)
    written = sum(1 for _ in answers)
    graph = io.StringIO()
    mx.export_to_dot(graph, made[0].recent)
    assert graph.getvalue().count("label") < 12
    assert written > 30 and made[0].recent.size >= PROMPT.size + written - 2


@pytest.fixture(scope="module", params=["attention", "recurrence"])
def ending_in(request):
    """A model whose last layer is of this kind."""
    layers = {"attention": 3, "recurrence": 4}[request.param]
    return random_model(
        config=GriffinConfig(vocab_size=96, **{**SHAPE, "num_hidden_layers": layers})
    )


def test_the_last_layers_are_of_both_kinds(ending_in, request):
    kinds = {"attention": LocalAttentionBlock, "recurrence": RecurrentBlock}
    (kind,) = (kinds[name] for name in kinds if name in request.node.name)
    assert type(ending_in.layers[-1].temporal_block) is kind


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 300])
def test_logits_of_the_last_token_alone(ending_in, length, rows):
    """And none: the state goes on as it does when all are asked for. The window is 16."""
    tokens = mx.random.randint(3, 96, (3, rows, length), key=mx.random.key(length))
    every, one, none = (ending_in.make_cache(rows) for _ in range(3))
    for part in tokens:  # at the beginning, and with a state
        expected = ending_in(part, every)[:, -1]
        assert mx.allclose(ending_in.last_logits(part, one), expected, atol=5e-5)
        ending_in.prefill(part, none)
        for caches in zip(every, one, none, strict=True):
            for x, y, z in zip(*(c.state for c in caches), strict=True):
                assert mx.allclose(x, y, atol=5e-5) and mx.allclose(x, z, atol=5e-5)


@pytest.mark.parametrize("name", ["prefill", "last_logits"])
def test_the_last_layer_computes_the_last_token_only(ending_in, monkeypatch, name):
    """But for what its state is made of: its first projections."""
    rows: dict[int, int] = {}
    multiply = Linear.__call__

    def note(layer, x):
        rows[id(layer)] = x.shape[1]
        return multiply(layer, x)

    monkeypatch.setattr(Linear, "__call__", note)
    ending_in.prepare_for_inference(dequantize=False)
    getattr(ending_in, name)(mx.ones((1, 50), mx.int32), ending_in.make_cache())
    layer = ending_in.layers[-1]
    block, mlp = layer.temporal_block, layer.mlp_block
    out = block.o_proj if isinstance(block, LocalAttentionBlock) else block.linear_out
    fused = mlp.fused_projection().layer  # the gate and up projections of a single token
    assert [rows[id(z)] for z in (out, fused, mlp.down_proj)] == [1] * 3
    earlier = ending_in.layers[0]
    assert (
        rows[id(earlier.mlp_block.down_proj)] == rows[id(earlier.temporal_block.linear_out)] == 50
    )


def test_no_logits_but_the_last_are_computed(embedded, monkeypatch):
    model, _ = embedded
    rows = []
    head = type(model).head
    monkeypatch.setattr(
        type(model), "head", lambda self, x: (rows.append(x.shape), head(self, x))[1]
    )
    model.last_logits(PROMPT[None], model.make_cache())
    assert rows == [(1, model.args.hidden_size)]
