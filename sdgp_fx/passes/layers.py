"""A layer as it stands in a joint graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import fx

from ..kernels.op import PRUNE_NM
from .module_names import module_of

# In the meta of a grad_output of fewer channels: what has been decided of the layer.
DECISION = "sdgp_decision"


@dataclasses.dataclass(frozen=True)
class Layer:
    """The product that computes a layer's input gradient from its grad_output and its weight.

    kind: "conv" or "linear".
    node: of the backward; it stands for the layer, and bears its name.
    grad_output: shape (N, C_out, *spatial); of a linear layer (..., C_out).
    weight: its output channels lie in dimension 0; if transposed, in dimension 1.
    input: of the forward, shape (N, C_in, *spatial); of a linear layer (..., C_in).
    uses: of each value of grad_output, in the product, on average; an int or symbolic.
    has_input_grad: whether the product is computed and used.
    has_weight_grad: whether the weight's gradient is computed, as the graph was before a rewrite.
    is_pruned: whether its grad_output is pruned already.
    feed: gives the product another grad_output and weight, and leaves everything else as it is.
    """

    kind: str
    node: fx.Node
    grad_output: fx.Node
    weight: fx.Node
    groups: int
    transposed: bool
    input: fx.Node
    uses: Any
    has_input_grad: bool
    has_weight_grad: bool
    is_pruned: bool
    feed: Callable[[fx.Node, fx.Node], None]

    @property
    def channels(self) -> Any:
        """C_out, an int or symbolic."""
        return self.grad_output.meta["val"].shape[self.channel_dim]

    @property
    def channel_dim(self) -> int:
        """Of grad_output."""
        return 1 if self.kind == "conv" else self.grad_output.meta["val"].dim() - 1

    @property
    def multiply_adds(self) -> Any:
        """Of the forward's product, an int or symbolic; that of each gradient has as many."""
        nodes = (self.input, self.weight, self.grad_output)
        return multiply_adds(
            self.kind, self.transposed, *(node.meta["val"].shape for node in nodes)
        )

    def module(self, roots: Collection[str] = ()) -> str:
        """The layer's name. roots: of the graph's modules, as for `module_name`."""
        return module_of(self.node, roots)


def multiply_adds(
    kind: str,
    transposed: bool,
    input: Sequence[Any],
    weight: Sequence[Any],
    output: Sequence[Any],
) -> Any:
    """Of a layer's forward, from shapes as in `Layer`, output's that of grad_output.

    Those with the zeros of a padding count.
    """
    if kind == "linear":
        return math.prod(input) * output[-1]
    return math.prod(input if transposed else output) * math.prod(weight[1:])


def plain_sizes(shape: Iterable[Any]) -> tuple[int | str, ...]:
    """A shape for people and JSON: a symbolic size is its symbol's name."""
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


def is_pruned(grad_output: fx.Node) -> bool:
    return grad_output.target is PRUNE_NM or DECISION in grad_output.meta
