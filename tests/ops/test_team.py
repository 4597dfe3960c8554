"""Threads that take shares of a loop: all of it is done, once, and errors arrive."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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
