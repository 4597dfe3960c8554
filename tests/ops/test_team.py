"""Threads that take shares of a loop: all of it is done, once, and errors arrive."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ON_GPU

from mlx_rgemma.ops import loops, team

pytestmark = pytest.mark.skipif(
    ON_GPU or not sys.platform.startswith("linux"), reason="loops run on a Linux CPU only"
)


@pytest.fixture(params=[1, 2, 3, 5])
def cores(request, monkeypatch):
    """Helpers of its own for a machine of so many cores."""
    monkeypatch.setattr(team, "cores", lambda: request.param)
    helpers = [team._Helper(number) for number in range(1, max(request.param, 2))]
    monkeypatch.setattr(team, "_helpers", lambda: helpers)
    return request.param


def count_up(first, last, numbers, threads):
    numbers[first:last] += 1
    threads.add(threading.current_thread().name)


@pytest.mark.parametrize("attentive", [False, True])
def test_each_unit_is_done_once(cores, attentive):
    numbers, threads = np.zeros(100), set()
    cuts = [100 * i // cores for i in range(cores + 1)]

    def repeatedly():
        for _ in range(50):
            team.share(count_up, cuts, (numbers, threads))

    if attentive:
        with team.attentive():
            repeatedly()
    else:
        repeatedly()
    assert (numbers == 50).all()
    assert len(threads) == cores


def test_more_shares_than_helpers(cores):
    numbers = np.zeros(30)
    team.share(count_up, range(0, 31, 3), (numbers, set()))
    assert (numbers == 1).all()


def test_an_error_beside_arrives_and_work_goes_on(cores):
    def fail(first, last, numbers):
        numbers[first:last] += 1
        if first > 0:
            raise ValueError(f"at {first}")

    if cores == 1:
        return
    numbers = np.zeros(cores)
    for _ in range(2):
        with pytest.raises(ValueError, match="at 1"):
            team.share(fail, range(cores + 1), (numbers,))
    team.share(count_up, range(cores + 1), (numbers, set()))
    assert numbers.tolist() == [3.0] * cores


def test_callers_in_several_threads(cores):
    def job(seed):
        numbers = np.zeros(1000)
        for _ in range(30):
            team.share(count_up, [1000 * i // cores for i in range(cores + 1)], (numbers, set()))
        return (numbers == 30).all()

    with ThreadPoolExecutor(4) as pool, team.attentive():
        assert all(pool.map(job, range(8)))


@pytest.fixture
def meeting(cores, monkeypatch):
    """Run ``loop(core, _, cores, arrivals, ...)`` on all cores; where it can meet the others."""
    monkeypatch.setattr(loops, "cores", lambda: cores)
    meet = import_module("mlx_rgemma.cpu.kernels.threads").meet
    meet(np.zeros(1, np.int64), 1)  # compiled

    def run(loop, *arguments):
        monkeypatch.setattr(loops, "_loops", lambda: SimpleNamespace(loop=loop))
        assert loops.crew() == cores
        loops.together("loop", cores, *arguments)

    return run, meet


def test_all_meet(meeting, cores):
    """What one wrote before, all see afterwards, many times."""
    run, meet = meeting

    def loop(core, _, number, arrivals, written, seen):
        assert number == cores
        for turn in range(200):
            written[core] = turn + 1
            meet(arrivals, (2 * turn + 1) * number)
            seen[core, turn] = written.sum()
            meet(arrivals, (2 * turn + 2) * number)

    written, seen = np.zeros(cores), np.zeros((cores, 200))
    run(loop, written, seen)
    assert (seen == cores * np.arange(1, 201)).all()


def test_several_threads_have_all_meet(meeting, cores, monkeypatch):
    """Helpers take the shares of several givers in the same order: none waits for ever."""
    run, meet = meeting
    counters, give = [], team._Helper.give

    def slowly(helper, part):
        time.sleep(0.001)  # another giver's turn, if it may have one
        give(helper, part)

    monkeypatch.setattr(team._Helper, "give", slowly)

    def loop(core, _, number, arrivals, done):
        counters.append(arrivals)
        for turn in range(1, 4):
            meet(arrivals, turn * number)
        done[core] += 1

    results = [np.zeros(cores) for _ in range(3)]
    threads = [
        threading.Thread(target=lambda done=done: [run(loop, done) for _ in range(10)], daemon=True)
        for done in results
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    finished = not any(thread.is_alive() for thread in threads)
    for arrivals in counters:
        arrivals[0] = 1 << 62
    assert finished and all((done == 10).all() for done in results)


@pytest.mark.parametrize("culprit", [0, 1])
def test_who_fails_is_not_waited_for(meeting, cores, culprit):
    run, meet = meeting

    def loop(core, _, number, arrivals):
        if core == culprit:
            raise KeyboardInterrupt(f"in {core}")
        meet(arrivals, number)

    for _ in range(3):
        if culprit < cores:
            with pytest.raises(KeyboardInterrupt, match=f"in {culprit}"):
                run(loop)
    done = np.zeros(cores)
    run(lambda core, _, number, arrivals, done: done.__setitem__(core, 1), done)
    assert done.all()


def test_an_interruption_while_shares_are_given(meeting, cores, monkeypatch):
    """Whoever waits for a share that was never given goes on."""
    run, meet = meeting
    if cores < 3:
        return
    given = []

    def give(helper, part):
        if len(given) == 1:
            raise KeyboardInterrupt
        given.append(part)
        helper_give(helper, part)

    helper_give = team._Helper.give
    with monkeypatch.context() as patch:
        patch.setattr(team._Helper, "give", give)
        with pytest.raises(KeyboardInterrupt):
            run(lambda core, _, number, arrivals: meet(arrivals, number))
    assert given[0].done.acquire(timeout=60)


def test_a_helper_sleeps_after_a_while():
    """What is to come is looked out for in a step alone, and not for long."""
    team.share(count_up, [0, 1, 2], (np.zeros(2), set()))
    with team.attentive():
        team.share(count_up, [0, 1, 2], (np.zeros(2), set()))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1
    assert team._attention.wanted == 0


def test_looking_out_ends_when_something_is_given():
    given = np.zeros(1, np.int64)
    looking = loops._loops().look_out
    looking(given, 0, 10, 1)  # compiled
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(looking, given, 0, 1 << 40, 1)  # minutes
        time.sleep(0.05)
        assert not found.done()
        given += 1
        found.result(10)


def _in_child(answers):
    numbers = np.zeros(100)
    team.share(count_up, [0, 50, 100], (numbers, set()))
    answers.put(numbers.tolist())


def test_a_child_process_has_helpers_of_its_own():
    team.share(count_up, [0, 1, 2], (np.zeros(2), set()))
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(answers,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and answers.get() == [1.0] * 100
