"""The pass as Inductor takes it: with what belongs into the key of its caches, and a report."""

from __future__ import annotations

import functools
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .config import SDGPConfig
from .inspection.capture import is_joint, recorded
from .passes.decisions import Decision
from .passes.prune_input_grads import prune_input_grads
from .passes.statistics import record_statistics

log = logging.getLogger(__name__)

# All of the package: the pass, the operator's fake kernel and its lowering all decide what code
# is generated, and a cached graph from other sources must not be served.
_SOURCES = tuple(str(path) for path in sorted(Path(__file__).parent.rglob("*.py")))


class PruneInputGrads(CustomGraphPass):
    """The pass as Inductor takes it, with what belongs into the key of its caches.

    before: passes that the user has put into the same place; they run first.
    roots: from `module_roots`, where the names of layers start.
    monitor: the recipient of the statistics of `record_statistics`; None leaves them out.
    """

    def __init__(
        self,
        config: SDGPConfig,
        before: Sequence[Callable[[fx.Graph], Any]] = (),
        roots: Collection[str] = (),
        monitor: str | None = None,
    ) -> None:
        self.config = config
        self.before = tuple(before)
        self.roots = frozenset(roots)
        self.monitor = monitor

    def __call__(self, graph: fx.Graph) -> None:
        for other in self.before:
            other(graph)
        _report(graph, recorded(graph, functools.partial(self._rewrite, graph)))

    def _rewrite(self, graph: fx.Graph) -> list[Decision]:
        decisions = prune_input_grads(graph, self.config, self.roots)
        if self.monitor is not None:
            record_statistics(graph, self.monitor, self.roots)
        return decisions

    def uuid(self) -> Any | None:
        others = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before]
        if None in others:
            return None  # Inductor then compiles without its caches.
        decisive = repr((self.config, sorted(self.roots), self.monitor))
        return (get_hash_for_files(_SOURCES, decisive), *others)


def _report(graph: fx.Graph, decisions: list[Decision]) -> None:
    """Log the decisions; warn if this is a training graph and nothing in it is pruned."""
    for decision in decisions:
        log.info("%s", decision)
    if is_joint(graph) and not any(decision.pruned for decision in decisions):
        reasons = Counter(decision.reason for decision in decisions)
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        why = why or "it has no layer of the kind that is pruned"
        warnings.warn(f"sdgp pruned nothing in a training graph: {why}", stacklevel=2)
