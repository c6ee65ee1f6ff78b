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
    return _load(_facts(problem))


def save(problem: Problem, times: dict[str, float]) -> None:
    """Keep the times of a problem on its device."""
    store.write(_path(_facts(problem)), json.dumps(times))
    _load.cache_clear()


@functools.cache
def _load(facts: Hashable) -> dict[str, float] | None:
    path = _path(facts)
    if not path.exists():
        return None
    times: dict[str, float] = json.loads(path.read_text())
    return times


def _path(facts: Hashable) -> Path:
    return store.folder() / f"product-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"


def _facts(problem: Problem) -> Hashable:
    """Identify a problem on a device, and the libraries that compute it."""
    tensors = [(tuple(t.shape), t.stride(), str(t.dtype)) for t in problem[:2]]
    rest = (tuple(v) if isinstance(v, list | torch.Size) else v for v in problem[3:])
    return (
        *(torch.cuda.get_device_name(problem.grad_output.device), torch.__version__),
        *(torch.backends.cudnn.version(), torch.backends.cudnn.benchmark, store.version()),
        *(*tensors, *rest),
    )
