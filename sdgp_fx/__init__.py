"""Structured data gradient pruning (McDanel et al. 2022) as a torch.compile backend.

    torch.compile(model, backend="sdgp")

needs no import of this package; these are for those who look inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import SDGPConfig

if TYPE_CHECKING:
    from .backend import sdgp
    from .explanation import explain
    from .kernels.op import prune
    from .monitoring import monitor
    from .recording import capture
    from .report import Explanation

__all__ = ["Explanation", "SDGPConfig", "capture", "explain", "monitor", "prune", "sdgp"]

_HOMES = {
    "Explanation": "report",
    "capture": "recording",
    "explain": "explanation",
    "monitor": "monitoring",
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
