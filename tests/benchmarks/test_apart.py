"""Test calls in other processes."""

import operator
import os
import time

import pytest

from benchmarks.harness.apart import run_apart


def run(*calls, jobs=2, limit=60, lifetime=10):
    return dict(run_apart(list(calls), jobs, limit, lifetime))


def test_results_by_key():
    calls = [(i, operator.mul, (i, 10)) for i in range(5)]
    assert run(*calls) == {i: 10 * i for i in range(5)}


def test_processes_are_used_again_for_a_while():
    calls = [(i, os.getpid, ()) for i in range(5)]
    seen = list(run(*calls, jobs=1, lifetime=2).values())
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
    assert os.getpid() not in seen


def test_a_call_that_fails_dies_or_hangs_is_told_from_the_others():
    result = run(
        ("raises", operator.truediv, (1, 0)),
        ("dies", os._exit, (3,)),
        ("hangs", time.sleep, (600,)),
        *((i, operator.mul, (i, 10)) for i in range(3)),
        limit=5,
    )
    assert isinstance(result["raises"], RuntimeError)
    assert str(result["raises"]) == "ZeroDivisionError: division by zero"
    assert isinstance(result["dies"], ChildProcessError)
    assert "exit code 3" in str(result["dies"])
    assert isinstance(result["hangs"], TimeoutError)
    assert [result[i] for i in range(3)] == [0, 10, 20]


def test_calls_are_taken_when_they_can_start():
    taken = []

    def calls():
        for i in range(4):
            taken.append(i)
            yield i, operator.mul, (i, 10)

    results = run_apart(calls(), 1, 60, 10)
    assert next(results) == (0, 0)
    assert taken == [0]
    results.close()


def test_processes_end_with_an_interrupt():
    started = time.monotonic()
    results = run_apart([(0, os.getpid, ()), (1, time.sleep, (600,))], 2, 600, 10)
    _, pid = next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert time.monotonic() - started < 300
