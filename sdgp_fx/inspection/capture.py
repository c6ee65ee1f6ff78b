"""The joint graphs before and after the pass: for `capture`, for the log and for tlparse."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch._functorch.config as functorch_config
from torch import fx, nn
from torch._logging import trace_structured

from ..passes.decisions import Decision
from ..passes.layers import is_pruned

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CapturedGraph:
    """A joint graph of AOTAutograd's. Both graphs are copies, with the nodes' meta."""

    before: fx.GraphModule
    after: fx.GraphModule
    decisions: tuple[Decision, ...]

    def diff(self, context: int = 3) -> str:
        """What the pass changed, as a unified diff. context: unchanged lines around changes."""
        before, after = (readable(gm).splitlines() for gm in (self.before, self.after))
        lines = difflib.unified_diff(before, after, "before", "after", lineterm="", n=context)
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.decisions), self.diff()])


class Captured(Sequence[CapturedGraph]):
    """The joint graphs that were compiled, in that order.

    cached: how many graphs AOTAutograd's cache had compiled already, so that the pass didn't run
        and there is nothing to show.
    """

    def __init__(self) -> None:
        self.cached = 0
        self._graphs: list[CapturedGraph] = []
        self._runs = 0

    @overload
    def __getitem__(self, index: int) -> CapturedGraph: ...

    @overload
    def __getitem__(self, index: slice) -> list[CapturedGraph]: ...

    def __getitem__(self, index: int | slice) -> CapturedGraph | list[CapturedGraph]:
        return self._graphs[index]

    def __len__(self) -> int:
        return len(self._graphs)

    def __str__(self) -> str:
        parts = [f"joint graph {i}\n{graph}" for i, graph in enumerate(self)]
        if not parts:
            parts.append(
                "no joint graph: the backend compiled no training graph while this was open (a "
                "graph that was compiled before is not compiled again, torch.compiler.reset() "
                "forgets it)"
            )
        if self.cached:
            parts.append(f"{self.cached} graphs came from AOTAutograd's cache, without the pass")
        return "\n\n".join(parts)


_captures: list[Captured] = []


@contextlib.contextmanager
def capture() -> Iterator[Captured]:
    """Collect the joint graphs that the backend compiles inside, before and after the pass.

        with sdgp_fx.capture() as captured:
            compiled(images).sum().backward()
        print(captured[0].diff())

    AOTAutograd's cache would hide them, as the pass doesn't run on what it serves; so it is left
    out inside. Inductor's cache of generated code, which comes after the pass, is used. What is
    compiled is the same. A graph that was compiled before is not compiled again.
    """
    captured = Captured()
    _captures.append(captured)
    try:
        # Private; checked on torch 2.11, 2.14 and 2.15.
        with functorch_config.patch(
            enable_autograd_cache=False, enable_remote_autograd_cache=False
        ):
            yield captured
    finally:
        _captures[:] = [other for other in _captures if other is not captured]


@contextlib.contextmanager
def noting_cache_hits() -> Iterator[None]:
    """For all captures: count a compilation inside as cached, unless a pass is recorded."""
    before = [(captured, captured._runs) for captured in _captures]
    yield
    for captured, runs in before:
        captured.cached += captured._runs == runs


def recorded(graph: fx.Graph, rewrite: Callable[[], list[Decision]]) -> list[Decision]:
    """The decisions of rewrite, which is called once; show what it does to all who look.

    These are captures, the log at level DEBUG and a trace. Where there are none of them, this
    costs nothing.
    """
    for captured in _captures:
        captured._runs += 1
    # A graph may get here twice: what matters is what became of it the first time.
    if not is_joint(graph) or any(map(is_pruned, graph.nodes)):
        return rewrite()

    before: list[fx.GraphModule] = []

    def snapshot() -> str:
        before.append(_copy(graph))
        return readable(before[0])

    _trace("joint_graph_before", snapshot)  # Calls it if there is a trace.
    if not before and (_captures or log.isEnabledFor(logging.DEBUG)):
        before.append(_copy(graph))
    decisions = rewrite()
    if before:
        record = CapturedGraph(before[0], _copy(graph), tuple(decisions))
        for captured in _captures:
            captured._graphs.append(record)
        log.debug("%s", record.diff())
        _trace("joint_graph_after", lambda: readable(record.after))
        _trace("joint_graph_diff", record.diff)
        _trace("decisions", lambda: json.dumps(list(map(dataclasses.asdict, decisions))), "json")
    return decisions


def is_joint(graph: fx.Graph) -> bool:
    """Whether this is a graph of forward and backward, not of a forward alone."""
    # AOTAutograd (checked on torch 2.11, 2.13 and 2.15) names a joint graph's tangents so.
    return any(n.target.startswith("tangents") for n in graph.find_nodes(op="placeholder"))


def readable(gm: fx.GraphModule) -> str:
    """The graph as Python, with types, strides, devices and the lines that nodes come from."""
    text: str = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    return text


def _copy(graph: fx.Graph) -> fx.GraphModule:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return fx.GraphModule(graph.owning_module or nn.Module(), copied, "JointGraph")


def _trace(name: str, payload: Callable[[], str], encoding: str = "string") -> None:
    # Private, but the way into tlparse (checked on torch 2.11, 2.14 and 2.15).
    metadata: dict[str, Any] = {"name": f"sdgp_{name}", "encoding": encoding}
    trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=payload)
