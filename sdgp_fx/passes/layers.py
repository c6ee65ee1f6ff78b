"""A layer as it stands in a joint graph, and what is read from such graphs and added to them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import fx

from ..kernels.op import PRUNE_NM

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


def module_roots(gm: fx.GraphModule) -> frozenset[str]:
    """The outermost modules that hold parameters of a graph of Dynamo's, as paths of Dynamo's.

    A parameter's source is a path that says which of its parts are modules:
    "L['trainer'].model._modules['layer1']._parameters['weight']". That it is an attribute of the
    placeholder is private (checked on torch 2.11 and 2.14); one that Dynamo has not made has none.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    sources = filter(None, (getattr(node, "_dynamo_source", None) for node in inputs))
    held = (re.match(r"(.+?)\._(?:modules|parameters)\b", _with_dots(s.name)) for s in sources)
    return frozenset(match[1] for match in held if match)


def module_of(node: fx.Node, roots: Collection[str] = ()) -> str:
    """The module that a node of the backward belongs to: the innermost of the forward's stack.

    roots: of the graph's modules, as for `module_name`.
    """
    stack = node.meta.get("fwd_nn_module_stack")
    return module_name(list(stack.values())[-1][0], roots) if stack else ""


def module_name(path: str, roots: Collection[str] = ()) -> str:
    """A name of `named_modules()` from a path of Dynamo's.

    The paths (checked on torch 2.11, 2.14 and 2.15) are Python expressions that begin with a
    variable: "L['self'].layer1.0.conv1", "getattr(L['self'].layer1, '0').conv1" or
    "L['model']._modules['layer1'].conv1". A module within that was itself compiled has a wrapper,
    "_orig_mod"; one that keeps a bound method of its own as an attribute, as some do with their
    forward, is found by way of that, "__self__".

    roots: the modules from which names start, as from `module_roots`; the outermost counts.
        Below none of them, the variable is taken for the module.
    """
    path = _with_dots(path)
    above = [root for root in roots if re.match(rf"{re.escape(root)}(?![^.\[])", path)]
    if above:
        path = path.removeprefix(min(above, key=len))
    else:
        path = re.sub(r"^[LG]\['[^']*'\]", "", path)
    path = path.replace("._modules", "").replace("._orig_mod", "")
    path = re.sub(r"\.\w+\.__self__\b", "", path)
    return re.sub(r"\['?([^'\]]*)'?\]", r".\1", path).removeprefix(".")


def _with_dots(path: str) -> str:
    while (attribute := re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", path)) != path:
        path = attribute
    return path


def add_call(
    target: Any, args: tuple[Any, ...], value: Any, source: fx.Node, **kwargs: Any
) -> fx.Node:
    """A call before source, with its meta (module, stack trace, side of the partition).

    value: what the call returns, as a fake tensor.
    """
    with source.graph.inserting_before(source):
        node = source.graph.call_function(target, args, kwargs)
    node.meta = {**source.meta, "val": value}
    node.meta.pop("tensor_meta", None)
    return node


def compute(target: Any, args: tuple[Any, ...], source: fx.Node, **kwargs: Any) -> fx.Node:
    """add_call, with the value that target computes of its arguments' values."""
    value = target(*fx.node.map_arg(args, lambda operand: operand.meta["val"]), **kwargs)
    return add_call(target, args, value, source, **kwargs)
