"""Sessions: whatever is done to one, it is in the state of one plain pass over its tokens."""

from __future__ import annotations

import threading
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL
from helpers.models import golden_model

from mlx_rgemma import Session, batch_generate, generate, load, load_prompt_cache
from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.io.text import read_documents
from mlx_rgemma.sessions.prompt_cache import PENDING, save_prompt_cache

TEXT = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.fixture
def session(embedded) -> Session:
    return Session(*embedded)


def written(session: Session, count: int = 12, **options) -> list[int]:
    return [r.token for r in session.stream(max_tokens=count, **options)]


def next_logprobs(session: Session) -> np.ndarray:
    """What comes next, by a session that stays where it is."""
    return np.array(next(iter(session.fork().stream(max_tokens=1))).logprobs)


def test_a_session_writes_what_generate_does(embedded, session):
    model, tokenizer = embedded
    text = generate(model, tokenizer, TEXT, max_tokens=30)
    assert session.generate(TEXT, max_tokens=30) == text
    assert session.tokens_seen == len(tokenizer.encode(TEXT)) + 30
    fed = Session(model, tokenizer, prefill_step_size=3)
    assert fed.feed(TEXT).tokens == len(tokenizer.encode(TEXT))
    assert fed.generate(max_tokens=30) == " " + text  # nothing was cut between two words


def test_a_text_in_parts_is_the_whole_text(embedded, session):
    """BOS once, and no space in front of a part that has none."""
    model, tokenizer = embedded
    for part in ("Once upon", " a time", ", there", " was a little", " girl named Lily."):
        session.feed(part)
    assert session.tokens_seen == len(tokenizer.encode(TEXT))
    whole = Session(model, tokenizer)
    whole.feed(TEXT)
    assert np.abs(next_logprobs(session) - next_logprobs(whole)).max() < LOGITS_ATOL
    session.feed(tokenizer.bos_token + " And")
    assert session.tokens_seen == len(tokenizer.encode(TEXT + " And"))


def test_feeding_reports_how_far_and_how_fast(embedded):
    session = Session(*embedded, prefill_step_size=10)
    readings = []
    reading = session.feed(range(3, 48), progress=readings.append)
    assert [r.tokens for r in readings] == [11, 21, 31, 41, 45]
    assert all(a.seconds < b.seconds for a, b in pairwise(readings))
    assert reading.tokens == session.tokens_seen == 45
    assert reading.tokens_per_second == pytest.approx(45 / reading.seconds)
    assert session.feed("").tokens == 0
    assert session.feed([]).tokens == 0


def test_a_file_is_read_like_its_text(embedded, session, tmp_path):
    text = "\n\n".join(read_documents())[:3000]
    (tmp_path / "stories.txt").write_text(text, encoding="utf-8")
    with open(tmp_path / "stories.txt", encoding="utf-8") as file:
        reading = session.feed(file)
    whole = Session(*embedded)
    assert whole.feed(text).tokens == reading.tokens
    assert np.array_equal(next_logprobs(session), next_logprobs(whole))


def test_files_of_bytes_and_other_encodings_are_refused(session, tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("déjà".encode("latin-1"))
    with open(file, encoding="utf-8") as text, pytest.raises(UserError, match=r"latin.txt: not UT"):
        session.feed(text)
    with open(file, "rb") as binary, pytest.raises(UserError, match="opened in binary mode"):
        session.feed(binary)
    assert session.tokens_seen == 0


@pytest.mark.parametrize("stop_at", [1, 2, 7, 20])
def test_every_moment_of_a_stream_can_be_kept(embedded, session, stop_at, tmp_path):
    """Save, fork and mark between two pieces; each goes on bit for bit."""
    model, tokenizer = embedded
    session.feed(TEXT)
    expected, kept = [], {}
    for n, response in enumerate(session.stream(max_tokens=30), start=1):
        expected.append((response.token, np.array(response.logprobs)))
        if n == stop_at:
            assert session.tokens_seen == len(tokenizer.encode(TEXT)) + n
            assert session.last_token == response.token
            session.save(tmp_path / "s.safetensors")
            kept["fork"], mark = session.fork(), session.mark()
    kept["file"] = Session.load(tmp_path / "s.safetensors", model, tokenizer)
    session.rewind(mark)
    kept["mark"] = session
    for name, copy in kept.items():
        found = list(copy.stream(max_tokens=30 - stop_at))
        for response, (token, logprobs) in zip(found, expected[stop_at:], strict=True):
            assert response.token == token, name
            assert np.array_equal(np.array(response.logprobs), logprobs), name


def test_a_stream_can_be_left_and_taken_up(embedded, session):
    model, tokenizer = embedded
    whole = generate(model, tokenizer, TEXT, max_tokens=25)
    pieces = []
    for response in session.stream(TEXT, max_tokens=25):
        pieces.append(response.text)
        if response.generation_tokens == 9:
            break
    pieces.append(session.generate(max_tokens=16))
    assert "".join(pieces) == whole


def test_a_paused_stream_notices_that_the_session_has_changed(session):
    for change in (
        lambda: session.feed(" And"),
        lambda: session.rewind(session.mark()),
        lambda: session.generate(max_tokens=1),
    ):
        stream = session.stream(TEXT, max_tokens=10)
        next(stream)
        change()
        with pytest.raises(UserError, match="was changed while this stream"):
            next(stream)


def test_forks_are_independent_and_share_arrays(session):
    session.feed(TEXT)
    before = mx.get_active_memory()
    forks = [session.fork() for _ in range(50)]
    assert mx.get_active_memory() - before < session.nbytes
    assert forks[0].nbytes == session.nbytes == 111_360
    alone = written(session.fork())
    seen = session.tokens_seen
    forks[0].feed([100, 101])
    session.feed([102])
    assert written(forks[1]) == written(forks[2]) == alone
    assert [s.tokens_seen - seen for s in (forks[0], session, forks[3])] == [2, 1, 0]


def test_reading_on_does_not_grow_the_state(session):
    session.feed(TEXT)
    for response in session.stream(max_tokens=400):
        if response.generation_tokens == 100:
            before, peak = mx.get_active_memory(), mx.reset_peak_memory()
    assert peak is None
    assert mx.get_active_memory() - before < session.nbytes
    assert session.nbytes == 111_360


def test_stop_texts_limits_and_samplers(embedded, session):
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    model, tokenizer = embedded
    plain = generate(model, tokenizer, TEXT, max_tokens=40)
    stop = plain[20:26]
    assert session.generate(TEXT, max_tokens=40, stop=stop) == plain[: plain.index(stop)]
    processors = make_logits_processors(repetition_penalty=1.5)
    expected = generate(model, tokenizer, TEXT, max_tokens=20, logits_processors=processors)
    session = Session(model, tokenizer)
    assert session.generate(TEXT, max_tokens=20, logits_processors=processors) == expected

    def sample(seed: int) -> str:
        mx.random.seed(seed)
        own = Session(model, tokenizer)
        return own.generate(TEXT, max_tokens=20, sampler=make_sampler(temp=1.0))

    assert sample(1) == sample(1) != sample(2)


def test_states_go_into_batches_and_come_out(embedded):
    model, tokenizer = embedded
    prompts = ["The king", "A cat and a dog", "Once"]
    sessions = [Session(model, tokenizer) for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.feed(prompt)
    more = [tokenizer.encode(" went to", add_special_tokens=False)] * 3
    caches = [session.prompt_cache() for session in sessions]
    result = batch_generate(
        model, tokenizer, more, 9, prompt_caches=caches, return_prompt_caches=True
    )
    for session, tokens, cache in zip(sessions, result.token_ids, result.caches, strict=True):
        assert [r.token for r in session.stream(more[0], max_tokens=9)] == tokens
        left = Session.from_prompt_cache(model, tokenizer, cache)
        left.feed(" and")
        session.feed(" and")
        assert np.abs(next_logprobs(left) - next_logprobs(session)).max() < LOGITS_ATOL


def test_a_saved_session_is_a_prompt_cache(embedded, session, tmp_path):
    model, tokenizer = embedded
    session.metadata["title"] = "Lily"
    session.generate(TEXT, max_tokens=5)
    session.save(tmp_path / "s.safetensors")
    loaded = Session.load(tmp_path / "s.safetensors", model, tokenizer)
    assert loaded.metadata == {"title": "Lily"}
    cache = load_prompt_cache(tmp_path / "s.safetensors", model)
    assert cache[0].offset == session.tokens_seen == loaded.tokens_seen
    after = [r.token for r in session.stream(" She", max_tokens=9)]
    tokens = tokenizer.encode("\n She", add_special_tokens=False)[-1:]
    steps = model(mx.array([tokens]), cache=cache)[:, -1]
    assert int(steps.argmax().item()) == after[0]


def test_damaged_and_foreign_files_are_refused(embedded, session, tmp_path):
    model, tokenizer = embedded
    file = tmp_path / "s.safetensors"
    session.feed(TEXT)
    session.save(file)
    whole = file.read_bytes()
    for size in (0, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as error:
            Session.load(file, model, tokenizer)
        assert "\n" not in str(error.value)
    cases = [
        (model, model.make_cache(), {PENDING: "2048"}, "pending_token is '2048', expected a token"),
        (model, model.make_cache(), {PENDING: "x"}, "pending_token is 'x'"),
        (model, model.make_cache(3), {}, "3 sequences"),
        (golden_model("tiny-2b"), golden_model("tiny-2b").make_cache(), {}, "another model|layers"),
    ]
    for owner, cache, metadata, message in cases:
        save_prompt_cache(file, owner, cache, metadata)
        with pytest.raises(CheckpointError, match=message) as error:
            Session.load(file, model, tokenizer)
        assert str(error.value).startswith(str(file))
        assert "\n" not in str(error.value)


def test_mistakes(embedded, session):
    model, tokenizer = embedded
    for call, message in (
        (lambda: session.generate(), "the session is empty: give a prompt"),
        (lambda: session.generate(""), "the session is empty: give a prompt"),
        (lambda: session.generate("a", max_tokens=0), "max_tokens is 0"),
        (lambda: session.feed([5, 2048]), "token 2048"),
        (lambda: session.feed([-1]), "token -1"),
        (lambda: Session.from_prompt_cache(model, tokenizer, model.make_cache(2)), "2 sequences"),
        (lambda: Session.from_prompt_cache(model, tokenizer, []), "layers"),
        (lambda: session.rewind(Session(golden_model("tiny-2b"), tokenizer).mark()), "another"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert session.tokens_seen == 0


def test_an_exception_leaves_a_state_that_can_be_used(embedded, monkeypatch):
    model, tokenizer = embedded
    session = Session(model, tokenizer, prefill_step_size=4)
    session.feed(TEXT)
    seen, expected = session.tokens_seen, next_logprobs(session)
    block = model.layers[2]

    class Interrupted(type(block)):
        def __call__(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(block, "__class__", Interrupted)
    for attempt in (lambda: session.feed(" and then"), lambda: session.generate(max_tokens=3)):
        with pytest.raises(KeyboardInterrupt):
            attempt()
    monkeypatch.undo()
    assert session.tokens_seen == seen
    assert np.array_equal(next_logprobs(session), expected)


def test_threads_share_a_model(embedded):
    model, tokenizer = embedded
    shared = Session(model, tokenizer)
    shared.feed("Once upon a time")
    beginnings = [" there", " in", " a dog", " the", " two", " Lily"]
    expected = [shared.fork().generate(text, max_tokens=25) for text in beginnings]
    found: dict[int, list[str]] = {}
    handed: dict[int, Session] = {}

    def work(i: int) -> None:
        texts = []
        for _ in range(3):
            session = shared.fork()
            texts.append(session.generate(beginnings[i], max_tokens=25))
        own = Session(model, tokenizer)
        own.feed("Once upon a time")
        texts.append(own.generate(beginnings[i], max_tokens=20))
        handed[i], found[i] = own, texts

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(beginnings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for i, text in enumerate(expected):
        assert found[i][:3] == [text] * 3
        assert found[i][3] + handed[i].generate(max_tokens=5) == text
