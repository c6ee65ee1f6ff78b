"""The pass as Inductor takes it: with its part of the cache key, and with those who watch it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._logging import trace_structured

from .config import SDGPConfig
from .passes.decisions import Decision
from .passes.marks import is_pruned
from .passes.prune_input_grads import prune_input_grads
from .passes.statistics import record_statistics

log = logging.getLogger(__name__)

# All of the package: the pass, the operator's fake kernel and its lowering all decide what code
# is generated, and a cached graph from other sources must not be served.
_SOURCES = tuple(str(path) for path in sorted(Path(__file__).parent.rglob("*.py")))


@dataclasses.dataclass(frozen=True)
class RewrittenGraph:
    """A joint graph before and after the pass, as copies with the nodes' meta."""

    before: fx.GraphModule
    after: fx.GraphModule
    decisions: tuple[Decision, ...]

    def diff(self, context: int = 3) -> str:
        """Return what the pass changed as a unified diff, with context unchanged lines around."""
        before, after = (readable(gm).splitlines() for gm in (self.before, self.after))
        lines = difflib.unified_diff(before, after, "before", "after", lineterm="", n=context)
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.decisions), self.diff()])


class Observer(Protocol):
    """Receive what the pass does."""

    def on_rewrite(self, rewritten: RewrittenGraph) -> None:
        """Take a joint graph that the pass has seen for the first time."""

    def on_cached(self) -> None:
        """Learn that a compilation was served by a cache, and that the pass did not run."""


# All who want to be shown; an observer adds itself, and has to remove itself.
observers: list[Observer] = []


class PruneInputGrads(CustomGraphPass):
    """Run `prune_input_grads` as Inductor runs custom passes.

    Args:
        config: What is pruned, and how.
        before: Passes that the user has put into the same place; they run first.
        roots: From `module_roots`, where the names of layers start.
        monitor: Key of the receiver of the statistics, as for `record_statistics`; None records
            none.
        dense_half_first: As for `prune_input_grads`.
    """

    def __init__(
        self,
        config: SDGPConfig,
        before: Sequence[Callable[[fx.Graph], Any]] = (),
        roots: Collection[str] = (),
        monitor: str | None = None,
        dense_half_first: Collection[str] = (),
    ) -> None:
        self.config = config
        self.before = tuple(before)
        self.roots = frozenset(roots)
        self.monitor = monitor
        self.dense_half_first = frozenset(dense_half_first)
        self.runs = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.runs += 1
        for other in self.before:
            other(graph)
        _report(graph, self._rewrite_observed(graph))

    def uuid(self) -> Any | None:
        """Return the pass's part of the cache key; None has Inductor compile without caches."""
        others = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before]
        if None in others:
            return None
        sets = sorted(self.roots), sorted(self.dense_half_first)
        decisive = repr((self.config, *sets, self.monitor))
        return (get_hash_for_files(_SOURCES, decisive), *others)

    @contextmanager
    def noting_cache_hit(self) -> Iterator[None]:
        """Tell observers if what is compiled inside came from a cache, ahead of the pass."""
        runs = self.runs
        yield
        if self.runs == runs:
            for observer in tuple(observers):
                observer.on_cached()

    def _rewrite(self, graph: fx.Graph) -> list[Decision]:
        decisions = prune_input_grads(graph, self.config, self.roots, self.dense_half_first)
        if self.monitor is not None:
            record_statistics(graph, self.monitor, self.roots)
        return decisions

    def _rewrite_observed(self, graph: fx.Graph) -> list[Decision]:
        """Rewrite graph, and show it to observers, to the log at level DEBUG and to a trace.

        Where there is none of them, this costs nothing.
        """
        # A graph may get here twice: what matters is what became of it the first time.
        if not is_joint(graph) or any(map(is_pruned, graph.nodes)):
            return self._rewrite(graph)

        before: list[fx.GraphModule] = []

        def snapshot() -> str:
            before.append(_copy(graph))
            return readable(before[0])

        _trace("joint_graph_before", snapshot)  # Calls it if there is a trace.
        if not before and (observers or log.isEnabledFor(logging.DEBUG)):
            before.append(_copy(graph))
        decisions = self._rewrite(graph)
        if before:
            # Their layers' nodes are those of the graph itself, and would keep it alive.
            decided = tuple(dataclasses.replace(decision, layer=None) for decision in decisions)
            rewritten = RewrittenGraph(before[0], _copy(graph), decided)
            for observer in tuple(observers):
                observer.on_rewrite(rewritten)
            log.debug("%s", rewritten.diff())
            _trace("joint_graph_after", lambda: readable(rewritten.after))
            _trace("joint_graph_diff", rewritten.diff)
            plain = [decision.to_dict() for decision in decisions]
            _trace("decisions", lambda: json.dumps(plain), "json")
        return decisions


def is_joint(graph: fx.Graph) -> bool:
    """Whether this is a graph of forward and backward, not of a forward alone."""
    # AOTAutograd names a joint graph's tangents so.
    return any(n.target.startswith("tangents") for n in graph.find_nodes(op="placeholder"))


def readable(gm: fx.GraphModule) -> str:
    """Return the graph as Python, with types, strides, devices and the lines nodes come from."""
    text: str = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    return text


def _report(graph: fx.Graph, decisions: list[Decision]) -> None:
    """Log the decisions; warn if this is a training graph and nothing in it is pruned."""
    for decision in decisions:
        log.info("%s", decision)
    if is_joint(graph) and not any(decision.pruned for decision in decisions):
        reasons = Counter(decision.reason for decision in decisions)
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        why = why or "it has no layer of the kind that is pruned"
        warnings.warn(f"sdgp pruned nothing in a training graph: {why}", stacklevel=2)


def _copy(graph: fx.Graph) -> fx.GraphModule:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    gm = fx.GraphModule(graph.owning_module or nn.Module(), copied, "JointGraph")
    for name, branch in gm.named_children():
        if isinstance(branch, fx.GraphModule):
            setattr(gm, name, _copy(branch.graph))
    return gm


def _trace(name: str, payload: Callable[[], str], encoding: str = "string") -> None:
    metadata: dict[str, Any] = {"name": f"sdgp_{name}", "encoding": encoding}
    trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=payload)
