"""Find what a graph of AOTAutograd does with the weights that modules hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from torch import fx
from torch._ops import HigherOrderOperator

from ..passes.backward import backward_nodes, inner_graphs

# Why a weight that is an input of a graph is the weight of no layer in it.
NO_GRADIENT = "no gradient flows through it"
NESTED = "not known, its weight is used in a nested graph, as those of torch.cond"
OTHER_OPERATORS = "its weight is used by other operators than a layer's"

Origins = Mapping[fx.Node, frozenset[int]]


def find_origins(graph: fx.Graph, held: Collection[int]) -> Origins:
    """Find the nodes that are computed from tensors of the model alone, as merged weights are.

    Args:
        graph: As AOTAutograd makes it, joint or not.
        held: Positions, among the inputs of Dynamo's graph, of what the model holds.

    Returns:
        For each of these nodes the positions that it is computed from.
    """
    origins: dict[fx.Node, frozenset[int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        position = _position(node.meta.get("desc"))
        if position is not None and position in held:
            origins[node] = frozenset({position})
    _follow(graph, origins)
    return origins


def _follow(graph: fx.Graph, origins: dict[fx.Node, frozenset[int]]) -> None:
    """Add to origins the nodes of graph, whose placeholders it has, and of the graphs in it."""
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(i in origins for i in inputs):
            origins[node] = frozenset().union(*(origins[i] for i in inputs))
        for inner, operands in inner_graphs(node):
            for placeholder, operand in operands.items():
                # Of a graph that is called twice, an input is one or the other.
                found = origins.get(operand, frozenset()) | origins.get(placeholder, frozenset())
                if found:
                    origins[placeholder] = found
            _follow(inner, origins)


def why_no_layer(graph: fx.Graph, origins: Origins) -> dict[int, str]:
    """Say of each tensor of the model why it is no layer's weight, should it be none.

    Args:
        origins: From `find_origins` of the same graph.

    Returns:
        A reason for each position that the graph has.
    """
    backward = backward_nodes(graph)
    users: dict[int, set[fx.Node]] = defaultdict(set)
    for node, positions in origins.items():
        if node.graph is not graph:
            continue
        outside = {user for user in node.users if user not in origins and user.op != "output"}
        for position in positions:
            users[position] |= outside
    trained = _positions_with_gradient(graph)
    reasons = {}
    for position, nodes in users.items():
        if position not in trained and nodes.isdisjoint(backward):
            reasons[position] = NO_GRADIENT
        elif any(isinstance(node.target, HigherOrderOperator) for node in nodes):
            reasons[position] = NESTED
        else:
            reasons[position] = OTHER_OPERATORS
    return reasons


def _positions_with_gradient(graph: fx.Graph) -> set[int | None]:
    """Find the inputs of Dynamo's graph whose gradients the graph returns."""
    output = graph.output_node()
    returned = zip(output.args[0], output.meta.get("desc", ()), strict=False)  # type: ignore[arg-type]
    return {
        _position(desc.grad_of)
        for value, desc in returned
        if value is not None and hasattr(desc, "grad_of")
    }


def _position(desc: object) -> int | None:
    """Return the position among Dynamo's inputs of what AOTAutograd describes; None if unknown."""
    while hasattr(desc, "base"):  # A tensor within a subclass.
        desc = desc.base
    return getattr(desc, "idx", None)
