"""The thread pool runs every slice once, and errors reach the caller."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_rgemma.cpu import numba_runtime, thread_pool


@pytest.fixture(params=[1, 2, 3, 5])
def cores(request, monkeypatch):
    """A pool of its own for a machine of so many cores."""
    monkeypatch.setattr(thread_pool, "num_threads", lambda: request.param)
    workers = [thread_pool._Worker(number) for number in range(1, max(request.param, 2))]
    monkeypatch.setattr(thread_pool, "_workers", lambda: workers)
    return request.param


def count_up(first, last, numbers, threads):
    numbers[first:last] += 1
    threads.add(threading.current_thread().name)


@pytest.mark.parametrize("spinning", [False, True])
def test_each_item_is_done_once(cores, spinning):
    numbers, threads = np.zeros(100), set()
    cuts = [100 * i // cores for i in range(cores + 1)]

    def repeatedly():
        for _ in range(50):
            thread_pool.parallel_for(count_up, cuts, (numbers, threads))

    if spinning:
        with thread_pool.spin_between_tasks():
            repeatedly()
    else:
        repeatedly()
    assert (numbers == 50).all()
    assert len(threads) == cores


def test_more_slices_than_workers(cores):
    numbers = np.zeros(30)
    thread_pool.parallel_for(count_up, range(0, 31, 3), (numbers, set()))
    assert (numbers == 1).all()


def test_an_error_in_a_worker_reaches_the_caller(cores):
    def fail(first, last, numbers):
        numbers[first:last] += 1
        if first > 0:
            raise ValueError(f"at {first}")

    if cores == 1:
        return
    numbers = np.zeros(cores)
    for _ in range(2):
        with pytest.raises(ValueError, match="at 1"):
            thread_pool.parallel_for(fail, range(cores + 1), (numbers,))
    thread_pool.parallel_for(count_up, range(cores + 1), (numbers, set()))
    assert numbers.tolist() == [3.0] * cores


def test_callers_in_several_threads(cores):
    def job(seed):
        numbers = np.zeros(1000)
        for _ in range(30):
            thread_pool.parallel_for(
                count_up, [1000 * i // cores for i in range(cores + 1)], (numbers, set())
            )
        return (numbers == 30).all()

    with ThreadPoolExecutor(4) as pool, thread_pool.spin_between_tasks():
        assert all(pool.map(job, range(8)))


@pytest.fixture
def region(cores, monkeypatch):
    """Run ``loop(core, _, cores, barrier, ...)`` on all cores; where it can meet the others."""
    monkeypatch.setattr(numba_runtime, "num_threads", lambda: cores)
    barrier_wait = import_module("mlx_rgemma.cpu.kernels.threads").barrier_wait
    barrier_wait(np.zeros(1, np.int64), 1)  # compiled

    def run(kernel, *arguments):
        monkeypatch.setattr(numba_runtime, "_kernels", lambda: SimpleNamespace(kernel=kernel))
        assert numba_runtime.max_region_threads() == cores
        numba_runtime.run_region("kernel", cores, *arguments)

    return run, barrier_wait


def test_all_barrier_wait(region, cores):
    """Every thread sees the writes before the barrier, many times."""
    run, barrier_wait = region

    def kernel(thread, _, number, barrier, written, seen):
        assert number == cores
        for turn in range(200):
            written[thread] = turn + 1
            barrier_wait(barrier, (2 * turn + 1) * number)
            seen[thread, turn] = written.sum()
            barrier_wait(barrier, (2 * turn + 2) * number)

    written, seen = np.zeros(cores), np.zeros((cores, 200))
    run(kernel, written, seen)
    assert (seen == cores * np.arange(1, 201)).all()


def test_several_threads_have_all_barrier_wait(region, cores, monkeypatch):
    """Workers run the tasks of several callers in the same order."""
    run, barrier_wait = region
    counters, give = [], thread_pool._Worker.submit

    def slowly(worker, part):
        time.sleep(0.001)  # another caller could submit in between
        give(worker, part)

    monkeypatch.setattr(thread_pool._Worker, "submit", slowly)

    def kernel(thread, _, number, barrier, done):
        counters.append(barrier)
        for turn in range(1, 4):
            barrier_wait(barrier, turn * number)
        done[thread] += 1

    results = [np.zeros(cores) for _ in range(3)]

    def repeatedly(done):
        for _ in range(10):
            run(kernel, done)

    threads = [
        threading.Thread(
            target=lambda done=done: [run(kernel, done) for _ in range(10)], daemon=True
        )
        for done in results
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    finished = not any(thread.is_alive() for thread in threads)
    for barrier in counters:
        barrier[0] = 1 << 62
    assert finished and all((done == 10).all() for done in results)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failing_thread_releases_the_barrier(region, cores, culprit):
    run, barrier_wait = region

    def kernel(thread, _, number, barrier):
        if thread == culprit:
            raise KeyboardInterrupt(f"in {thread}")
        barrier_wait(barrier, number)

    for _ in range(3):
        if culprit < cores:
            with pytest.raises(KeyboardInterrupt, match=f"in {culprit}"):
                run(kernel)
    done = np.zeros(cores)
    run(lambda thread, _, number, barrier, done: done.__setitem__(thread, 1), done)
    assert done.all()


def test_an_interruption_while_tasks_are_submitted(region, cores, monkeypatch):
    """A thread that waits for a task that was never submitted is released."""
    run, barrier_wait = region
    if cores < 3:
        return
    given = []

    def give(worker, part):
        if len(given) == 1:
            raise KeyboardInterrupt
        given.append(part)
        worker_give(worker, part)

    worker_give = thread_pool._Worker.submit
    with monkeypatch.context() as patch:
        patch.setattr(thread_pool._Worker, "submit", give)
        with pytest.raises(KeyboardInterrupt):
            run(lambda thread, _, number, barrier: barrier_wait(barrier, number))
    assert given[0].done.acquire(timeout=60)


def test_a_worker_sleeps_after_a_while():
    """It spins within `spin_between_tasks` alone, and not for long."""
    thread_pool.parallel_for(count_up, [0, 1, 2], (np.zeros(2), set()))
    with thread_pool.spin_between_tasks():
        thread_pool.parallel_for(count_up, [0, 1, 2], (np.zeros(2), set()))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1
    assert thread_pool._spinning.wanted == 0


def test_spinning_ends_when_a_task_is_submitted():
    given = np.zeros(1, np.int64)
    looking = numba_runtime._kernels().spin_wait
    looking(given, 0, 10, 1)  # compiled
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(looking, given, 0, 1 << 40, 1)  # minutes
        time.sleep(0.05)
        assert not found.done()
        given += 1
        found.result(10)


def _in_child(answers):
    numbers = np.zeros(100)
    thread_pool.parallel_for(count_up, [0, 50, 100], (numbers, set()))
    answers.put(numbers.tolist())


def test_a_child_process_has_workers_of_its_own():
    thread_pool.parallel_for(count_up, [0, 1, 2], (np.zeros(2), set()))
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(answers,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and answers.get() == [1.0] * 100
