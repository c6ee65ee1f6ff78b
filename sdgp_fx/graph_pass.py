"""The pass as Inductor takes it: with its part of the cache key, and with those who watch it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch._functorch.config as functorch_config
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._logging import trace_structured

from .config import SDGPConfig
from .passes.backward import tangents_of
from .passes.decisions import Decision
from .passes.marks import is_rewritten
from .passes.module_names import ModuleNames
from .passes.products import skip_zeros
from .passes.prune_input_grads import prune_input_grads
from .passes.rules import patterns_above_layers
from .passes.statistics import record_statistics

log = logging.getLogger(__name__)

# All of the package: the pass, the operator's fake kernel and its lowering all decide what code
# is generated, and a cached graph from other sources must not be served.
_SOURCES = tuple(str(path) for path in sorted(Path(__file__).parent.rglob("*.py")))


@dataclasses.dataclass(frozen=True)
class RewrittenGraph:
    """A joint graph at each step of the pass, as copies with the nodes' meta.

    Attributes:
        before: As AOTAutograd made it.
        pruned: With pruned gradients ahead of the input gradients.
        after: With the products that skip their zeros, where a decision says so.
    """

    before: fx.GraphModule
    pruned: fx.GraphModule
    after: fx.GraphModule
    decisions: tuple[Decision, ...]

    def diff(self, context: int = 3, *, start: str = "before", end: str = "after") -> str:
        """Return what changed from one step to another as a unified diff.

        Args:
            context: Unchanged lines around each change.
            start, end: "before", "pruned" or "after".
        """
        old, new = (readable(getattr(self, step)).splitlines() for step in (start, end))
        return "\n".join(difflib.unified_diff(old, new, start, end, lineterm="", n=context))

    def diff_by_step(self) -> str:
        """Return what changed as `diff` does, but apart for each step that changed something."""
        if not (products := self.diff(start="pruned")):
            return self.diff()
        return f"{self.diff(end='pruned')}\n{products}"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.decisions), self.diff_by_step()])


class Observer(Protocol):
    """Receive what the pass does."""

    def on_rewrite(self, rewritten: RewrittenGraph) -> None:
        """Take a joint graph that the pass has seen for the first time."""

    def on_cached(self) -> None:
        """Learn that a compilation was served by a cache, and that the pass did not run."""


# All who want to be shown what this thread compiles; who sets it has to reset it.
observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


class PruneInputGrads(CustomGraphPass):
    """Run `prune_input_grads` as Inductor runs custom passes.

    Args:
        config: What is pruned, and how.
        before: Passes that the user has put into the same place; they run first.
        names: `module_names` of Dynamo's graph.
        monitor: Key of the receiver of the statistics, as for `record_statistics`; None records
            none.
        dense_half_first: As for `prune_input_grads`.
    """

    def __init__(
        self,
        config: SDGPConfig,
        before: Sequence[Callable[[fx.Graph], Any]] = (),
        names: ModuleNames = ModuleNames(),  # noqa: B008 (It is frozen.)
        monitor: str | None = None,
        dense_half_first: Collection[str] = (),
    ) -> None:
        self.config = config
        self.before = tuple(before)
        self.names = names
        self.monitor = monitor
        self.dense_half_first = frozenset(dense_half_first)
        self.runs = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.runs += 1
        for other in self.before:
            other(graph)
        decisions = self._rewrite_observed(graph)
        _report(graph, decisions)
        decided = {decision.module for decision in decisions}
        for message in patterns_above_layers(self.config, self.names, decided):
            warnings.warn(message, stacklevel=2)

    def uuid(self) -> Any | None:
        """Return the pass's part of the cache key; None has Inductor compile without caches."""
        others = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before]
        if None in others:
            return None
        names = None
        if self.config.has_rules or self.monitor is not None:  # Names decide, or are in the code.
            names = self.names.decisive()
        decisive = repr((self.config, names, sorted(self.dense_half_first), self.monitor))
        return (get_hash_for_files(_SOURCES, decisive), *others)

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Compile inside without AOTAutograd's cache, which is ahead of the pass, for observers.

        Tell them if it served what is compiled all the same.
        """
        runs = self.runs
        without_caches = functorch_config.patch(
            enable_autograd_cache=False, enable_remote_autograd_cache=False
        )
        with without_caches if observers.get() else nullcontext():
            yield
        if self.runs == runs:
            for observer in observers.get():
                observer.on_cached()

    def _rewrite(
        self, graph: fx.Graph, on_pruned: Callable[[fx.Graph], None] = lambda graph: None
    ) -> list[Decision]:
        decisions = prune_input_grads(graph, self.config, self.names, self.dense_half_first)
        on_pruned(graph)
        skip_zeros(graph, self.config)
        if self.monitor is not None:
            record_statistics(graph, self.monitor)
        return decisions

    def _rewrite_observed(self, graph: fx.Graph) -> list[Decision]:
        """Rewrite graph, and show it to observers, to the log at level DEBUG and to a trace.

        Where there is none of them, this costs nothing.
        """
        # A graph may get here twice: what matters is what became of it the first time.
        if not is_joint(graph) or any(map(is_rewritten, graph.nodes)):
            return self._rewrite(graph)

        before: list[fx.GraphModule] = []

        def snapshot() -> str:
            before.append(_copy(graph))
            return readable(before[0])

        _trace("joint_graph_before", snapshot)  # Calls it if there is a trace.
        if not before and (observers.get() or log.isEnabledFor(logging.DEBUG)):
            before.append(_copy(graph))
        if not before:
            return self._rewrite(graph)

        pruned: list[fx.GraphModule] = []
        decisions = self._rewrite(graph, lambda graph: pruned.append(_copy(graph)))
        # Their layers' nodes are those of the graph itself, and would keep it alive.
        decided = tuple(dataclasses.replace(decision, layer=None) for decision in decisions)
        rewritten = RewrittenGraph(before[0], pruned[0], _copy(graph), decided)
        for observer in observers.get():
            observer.on_rewrite(rewritten)
        log.debug("%s", rewritten.diff_by_step())
        _trace("joint_graph_after", lambda: readable(rewritten.after))
        _trace("joint_graph_diff", rewritten.diff)
        plain = [decision.to_dict() for decision in decisions]
        _trace("decisions", lambda: json.dumps(plain), "json")
        return decisions


def is_joint(graph: fx.Graph) -> bool:
    """Whether this is a graph of forward and backward, not of a forward alone."""
    return bool(tangents_of(graph))


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
