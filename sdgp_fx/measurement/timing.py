"""Time functions in turn in one process, and count the memory that they need."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")

# What must be touched between two uses of a tensor so that it is read from memory again: five
# times the L2 cache of the largest GPU known here (50 MiB).
_COLD = 256 * 2**20
_FEWEST, _MOST = 5, 1000


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        low, high: The quartiles.
        samples: How many were taken.
    """

    median: float
    low: float
    high: float
    samples: int


def measure(
    functions: Mapping[K, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    calls: int = 1,
    clock: Callable[[], float] | None = None,
) -> dict[K, Timing]:
    """Summarize `sample`, whose arguments these are.

    Args:
        calls: How often a function does its work in one call.
    """
    return {
        name: summarize([seconds / calls for seconds in column])
        for name, column in sample(functions, device, seconds, clock).items()
    }


def sample(
    functions: Mapping[K, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    clock: Callable[[], float] | None = None,
) -> dict[K, list[float]]:
    """Time functions in turn: what slows the machine down meets all of them alike.

    On CUDA only the end is waited for, not every function: the GPU then always has work queued,
    and what is timed is the GPU, or Python where that is the slower of the two.

    Args:
        seconds: About how long this takes, after two rounds of warm-up; a function runs 5 times
            at least, and 1000 times at most.
        clock: Read before and after each function, on a CPU; perf_counter if None.

    Returns:
        Seconds of each function's calls. The i-th of each are of one round, and so of about the
        same moment.
    """
    cuda = device.type == "cuda"
    mark = _event if cuda else clock or perf_counter
    wait = torch.cuda.synchronize if cuda else _nothing

    def run_round() -> list[tuple[Any, Any]]:
        marks = []
        for function in functions.values():
            start = mark()
            function()
            marks.append((start, mark()))
        return marks

    run_round()
    wait()
    begin = perf_counter()
    run_round()
    wait()
    rounds = int(seconds / (perf_counter() - begin))
    samples = [run_round() for _ in range(max(_FEWEST, min(rounds, _MOST)))]
    wait()
    return {
        name: [_elapsed(start, end) for start, end in column]
        for name, column in zip(functions, zip(*samples, strict=True), strict=True)
    }


def cold(make: Callable[[], T], size: int, device: torch.device) -> list[T]:
    """Call make until its results, of size bytes each, evict each other when used in turn.

    Going through several tensors does without a kernel that flushes the cache between two calls,
    so that any number of calls can be timed as one. On the CPU one result is enough: what runs
    there is no measurement of memory.
    """
    return [make() for _ in range(-(-_COLD // size) if device.type == "cuda" else 1)]


def back_to_back(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    """Return one function that makes all calls, without a pause between them.

    On CUDA it replays a graph of them: a call from Python takes longer than many kernels run,
    and events around it would time Python. No result shares memory with another, which would
    keep it in the cache.
    """
    if device.type != "cuda":

        def run() -> None:
            for call in calls:
                call()

        return run

    calls[0]()  # What compiles a kernel or chooses an algorithm can't be captured.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    results = []
    with torch.cuda.graph(graph):
        for call in calls:
            results.append(call())
    return graph.replay


def peak_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes that function holds at once, beyond those allocated before."""
    if device.type != "cuda":
        return _peak_memory_on_cpu(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_memory_on_cpu(function: Callable[[], Any]) -> int:
    """Read the profiler's record of PyTorch's allocations; libraries' own are not in it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    recorded = profile.profiler.kineto_results.events()
    changes = [event for event in recorded if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    if isinstance(start, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    return end - start


def _nothing() -> None:
    pass


def ratio(times: Sequence[float], others: Sequence[float]) -> Timing:
    """Summarize times relative to others of the same rounds, as from `sample`.

    What slows the machine down for a round meets both alike.
    """
    return summarize([time / other for time, other in zip(times, others, strict=True)])


def summarize(samples: Sequence[float]) -> Timing:
    """Summarize the seconds of one function's calls."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))
