"""Collect the joint graphs that the backend compiles, before and after the pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import overload

from ..graph_pass import RewrittenGraph, observers


class Captured(Sequence[RewrittenGraph]):
    """The joint graphs that were compiled, in that order.

    Attributes:
        cached: How many graphs AOTAutograd's cache had compiled already, so that the pass didn't
            run and there is nothing to show.
    """

    def __init__(self) -> None:
        self.cached = 0
        self._graphs: list[RewrittenGraph] = []

    def on_rewrite(self, rewritten: RewrittenGraph) -> None:
        """Append a joint graph that the pass has rewritten."""
        self._graphs.append(rewritten)

    def on_cached(self) -> None:
        """Count a graph that came from a cache."""
        self.cached += 1

    @overload
    def __getitem__(self, index: int) -> RewrittenGraph: ...

    @overload
    def __getitem__(self, index: slice) -> list[RewrittenGraph]: ...

    def __getitem__(self, index: int | slice) -> RewrittenGraph | list[RewrittenGraph]:
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


@contextlib.contextmanager
def capture() -> Iterator[Captured]:
    """Collect the joint graphs that the backend compiles inside, before and after the pass.

        with sdgp_fx.capture() as captured:
            compiled(images).sum().backward()
        print(captured[0].diff())

    Inside is what this thread compiles; other threads have captures of their own.

    AOTAutograd's cache would hide the graphs, as the pass doesn't run on what it serves; so it is
    left out inside. Inductor's cache of generated code, which comes after the pass, is used. What
    is compiled is the same. A graph that was compiled before is not compiled again.
    """
    captured = Captured()
    token = observers.set((*observers.get(), captured))
    try:
        yield captured
    finally:
        observers.reset(token)
