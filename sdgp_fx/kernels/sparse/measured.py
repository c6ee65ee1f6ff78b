"""Times of a GPU's products, which are kept on disk."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Hashable
from pathlib import Path

import torch

from . import store
from .problem import Problem

# Names of times, in milliseconds. Not every problem has a product by cuSPARSELt.
DENSE, SPARSE, CUSPARSELT = "dense_ms", "sparse_ms", "cusparselt_ms"


def load(problem: Problem) -> dict[str, float] | None:
    """Return the times of a problem on its device, by name; None if it was not measured."""
    return _load("product", _facts(problem))


def is_cusparselt_faster(problem: Problem) -> bool:
    """Whether cuSPARSELt was measured to be faster than the package's own product.

    The strides of the gradient do not count: both read rows, and Inductor may have changed them
    since the measurement.
    """
    times = _load("matrices", _facts_of_matrices(problem))
    return times is not None and times[CUSPARSELT] < times[SPARSE]


def save(problem: Problem, times: dict[str, float]) -> None:
    """Keep the times of a problem on its device."""
    store.write(_path("product", _facts(problem)), json.dumps(times))
    if {SPARSE, CUSPARSELT} <= set(times):
        store.write(_path("matrices", _facts_of_matrices(problem)), json.dumps(times))
    _load.cache_clear()


@functools.cache
def _load(kind: str, facts: Hashable) -> dict[str, float] | None:
    path = _path(kind, facts)
    if not path.exists():
        return None
    times: dict[str, float] = json.loads(path.read_text())
    return times


def _path(kind: str, facts: Hashable) -> Path:
    return store.folder() / f"{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"


def _facts(problem: Problem) -> Hashable:
    """Identify a problem on a device, and the libraries that compute it."""
    return (
        *(torch.backends.cudnn.version(), torch.backends.cudnn.benchmark),
        *(problem.grad_output.stride(), *_facts_of_matrices(problem)),
    )


def _facts_of_matrices(problem: Problem) -> tuple[Hashable, ...]:
    grad_output, weight = problem.grad_output, problem.weight
    rest = (tuple(v) if isinstance(v, list | torch.Size) else v for v in problem[3:])
    return (
        *(torch.cuda.get_device_name(grad_output.device), torch.__version__, store.version()),
        *(torch.backends.cusparselt.version(), tuple(grad_output.shape), str(grad_output.dtype)),
        *(tuple(weight.shape), weight.stride(), *rest),
    )
