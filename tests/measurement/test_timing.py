"""Test timing: in turn, within a budget, from cold memory; and the memory that is held."""

import itertools
from functools import partial

import pytest
import torch

from sdgp_fx.measurement import timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Clock:
    """Clock that stands still except while functions take their time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.log = []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def function(self, name, *seconds):
        """Return a function that takes these seconds in turn."""
        durations = itertools.cycle(seconds)

        def run():
            self.log.append(name)
            self.now += next(durations)

        return run


def test_functions_are_timed_in_turn(monkeypatch):
    clock = Clock(monkeypatch)
    functions = {"a": clock.function("a", 1), "b": clock.function("b", 2)}
    times = timing.measure(functions, CPU, seconds=30)
    assert clock.log == ["a", "b"] * (2 + 10)  # Two rounds of warm-up, then 30 seconds.
    assert times == {"a": timing.Timing(1, 1, 1, 10), "b": timing.Timing(2, 2, 2, 10)}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 5), (7, 7), (1e6, 1000)])
def test_the_budget_is_kept_between_least_and_most(monkeypatch, seconds, rounds):
    clock = Clock(monkeypatch)
    times = timing.measure({"a": clock.function("a", 1)}, CPU, seconds)
    assert times["a"].samples == rounds
    assert len(clock.log) == 2 + rounds


def test_median_and_quartiles_of_a_call(monkeypatch):
    clock = Clock(monkeypatch)
    functions = {"a": clock.function("a", 2, 1, 50, 3, 5, 4, 1)}  # The first two are warm-up.
    assert timing.measure(functions, CPU, 5, calls=2)["a"] == timing.Timing(2, 1.5, 2.5, 5)


def test_enough_tensors_to_find_none_in_the_cache():
    assert len(timing.cold(list, 2**20, CUDA)) == 256
    assert len(timing.cold(list, 300 * 2**20, CUDA)) == 1
    results = timing.cold(list, 200 * 2**20, CUDA)
    assert len(results) == 2
    assert results[0] is not results[1]
    assert len(timing.cold(list, 1, CPU)) == 1


def test_back_to_back_makes_all_calls():
    made = []
    run = timing.back_to_back([partial(made.append, i) for i in range(3)], CPU)
    assert made == []
    run()
    assert made == [0, 1, 2]


@pytest.mark.gpu
def test_back_to_back_and_memory_on_the_gpu():
    xs = [torch.full((1000,), float(i), device="cuda") for i in range(3)]
    outs = [torch.empty_like(x) for x in xs]
    run = timing.back_to_back(
        [partial(torch.neg, x, out=out) for x, out in zip(xs, outs, strict=True)], CUDA
    )
    for out in outs:
        out.zero_()
    run()
    torch.cuda.synchronize()
    assert [out[0].item() for out in outs] == [0, -1, -2]
    assert timing.measure({"run": run}, CUDA, 0.01, calls=3)["run"].median > 0
    assert timing.peak_memory(lambda: torch.empty(2**20, device="cuda").fill_(1), CUDA) >= 2**22


def test_memory_on_the_cpu_is_what_is_held_at_once():
    size = 2**22

    def allocate():
        first = torch.ones(size, dtype=torch.uint8)
        second = first + 1
        del first
        return second + 1

    before = torch.ones(size, dtype=torch.uint8)
    assert 2 * size <= timing.peak_memory(allocate, CPU) < 2.5 * size
    assert timing.peak_memory(lambda: before.add_(1), CPU) < size
