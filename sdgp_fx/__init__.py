"""Structured data gradient pruning (McDanel et al. 2022) as a torch.compile backend.

    torch.compile(model, backend="sdgp")

needs no import of this package; these are for those who look inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import SDGPConfig

if TYPE_CHECKING:
    from .backend import sdgp
    from .inspection.capture import capture
    from .inspection.explain import explain
    from .inspection.monitor import monitor
    from .inspection.report import Explanation
    from .kernels.op import prune

__all__ = ["Explanation", "SDGPConfig", "capture", "explain", "monitor", "prune", "sdgp"]

_HOMES = {
    "Explanation": "inspection.report",
    "capture": "inspection.capture",
    "explain": "inspection.explain",
    "monitor": "inspection.monitor",
    "prune": "kernels.op",
    "sdgp": "backend",
}


def __getattr__(name: str) -> Any:
    """Import torch's compiler only when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
