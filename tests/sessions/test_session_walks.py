"""Random sequences of everything that can be done to sessions agree with one plain pass."""

from __future__ import annotations

import random
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL
from helpers.models import MODELS, golden_model

from mlx_rgemma import Session, load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def embedded():
    return load()


def next_logprobs(session: Session) -> np.ndarray:
    """What comes next, by a session that stays where it is."""
    return np.array(next(iter(session.fork().stream(max_tokens=1))).logprobs)


class Walk:
    """Sessions, each with the list of tokens that it should have seen."""

    def __init__(self, model, tokenizer, folder, seed: int) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.rng = random.Random(seed)
        self.held = [(self.session(), [])]
        self.marks: list = []

    def session(self) -> Session:
        return Session(self.model, self.tokenizer, prefill_step_size=self.rng.choice([2, 7, 40]))

    def some(self, most: int) -> list[int]:
        return [self.rng.randint(3, 89) for _ in range(self.rng.randint(1, most))]

    def step(self) -> None:
        at = self.rng.randrange(len(self.held))
        session, tokens = self.held[at]
        action = self.rng.choice(
            ["feed", "feed", "write", "write", "fork", "mark", "rewind", "file", "batch", "new"]
        )
        if action == "feed" or not tokens:
            more = self.some(45)
            assert session.feed(more).tokens == len(more)
            self.held[at] = (session, tokens + more)
        elif action == "write" and session.last_token is not None:
            steps = session.stream(max_tokens=self.rng.choice([1, 4, 9]))
            more = [r.token for r in islice(steps, self.rng.randint(1, 9))]
            self.held[at] = (session, tokens + more)
        elif action == "fork":
            self.held.append((session.fork(), tokens))
        elif action == "mark":
            self.marks.append((session.mark(), tokens))
        elif action == "rewind" and self.marks:
            mark, marked = self.rng.choice(self.marks)
            session.rewind(mark)
            self.held[at] = (session, marked)
        elif action == "file":
            session.save(self.folder / "s.safetensors")
            loaded = Session.load(self.folder / "s.safetensors", self.model, self.tokenizer)
            self.held[at] = (loaded, tokens)
        elif action == "batch":
            self.batch()
        elif action == "new":
            self.held.append((self.session(), []))
        self.held = self.held[-3:]

    def batch(self) -> None:
        """Some join, go on together, one leaves, another joins, and all leave."""
        begun = [(s, t) for s, t in self.held if t]
        self.rng.shuffle(begun)
        first = begun[: self.rng.randint(1, len(begun))]
        late = begun[len(first) :]
        caches = [s.prompt_cache() for s, _ in first]
        batch = [type(layers[0]).merge(layers) for layers in zip(*caches, strict=True)]
        texts = [t for _, t in first]
        texts = self.together(batch, texts)
        done = []
        if len(texts) > 1:
            row = self.rng.randrange(len(texts))
            done.append(([layer.extract(row) for layer in batch], texts.pop(row)))
            for layer in batch:
                layer.filter([r for r in range(len(texts) + 1) if r != row])
        for session, tokens in late:
            for layer, other in zip(batch, session.prompt_cache(), strict=True):
                layer.extend(other)
            texts.append(tokens)
        texts = self.together(batch, texts)
        done += [([layer.extract(i) for layer in batch], t) for i, t in enumerate(texts)]
        for cache, tokens in done:
            session = Session.from_prompt_cache(self.model, self.tokenizer, cache)
            assert session.tokens_seen == len(tokens)
            self.held.append((session, tokens))

    def together(self, batch, texts: list[list[int]]) -> list[list[int]]:
        length = self.rng.randint(1, 6)
        rows = [[self.rng.randint(3, 89) for _ in range(length)] for _ in texts]
        mx.eval(self.model(mx.array(rows), cache=batch))
        return [text + row for text, row in zip(texts, rows, strict=True)]

    def check(self) -> None:
        for session, tokens in self.held:
            assert session.tokens_seen == len(tokens)
            session.feed([7])
            logits = self.model(mx.array([[*tokens, 7]]))[0, -1]
            expected = np.array(logits - mx.logsumexp(logits))
            assert np.abs(next_logprobs(session) - expected).max() < LOGITS_ATOL


@pytest.mark.parametrize("name", MODELS)
def test_a_thousand_random_sequences_agree_with_one_plain_pass(name, embedded, tmp_path):
    model, (_, tokenizer) = golden_model(name, num_hidden_layers=3), embedded
    assert set(model.args.layer_types) == {"recurrent", "attention"}
    for seed in range(334):
        walk = Walk(model, tokenizer, tmp_path, seed)
        for _ in range(walk.rng.randint(3, 7)):
            walk.step()
        walk.check()
