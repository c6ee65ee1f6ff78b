"""Check that a rewritten joint graph computes what it did, but for prunes of input gradients."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from sdgp_fx.config import SDGPConfig
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.decisions import Decision
from sdgp_fx.passes.linears import MM

aten = torch.ops.aten

# Places among the arguments of convolution_backward.
_GROUPS, _MASK = 9, 10
_INPUT_ONLY = [True, False, False]


class Result(NamedTuple):
    """Result of a check.

    Attributes:
        violations: What the rewritten graph does that it must not, in words; none if all is right.
        gradients: How many gradients the graph returns.
        identical: How many of them are computed as before, with no prune upstream.
    """

    violations: list[str]
    gradients: int
    identical: int


class Original:
    """Record of what a joint graph computes, made before the graph is rewritten in place."""

    def __init__(self, graph: fx.Graph) -> None:
        self._known: dict[Any, int] = {}
        numbers = self._numbers(graph)
        self._effects = [numbers[node] for node in _effects(graph)]

    def check(self, graph: fx.Graph, decisions: Sequence[Decision], config: SDGPConfig) -> Result:
        """Compare the rewritten graph with the original.

        All is right if every output, and whatever is mutated, is computed as before but for
        prunes of gradients; if these are as many and as configured as was decided; and if each is
        read by nothing but products that sum over the channels which it prunes. Such a product
        is an input gradient: those of weight and bias sum over samples and positions.

        Args:
            config: With rescale scope "group" and a pruning function that draws no numbers.
        """
        effects = list(_effects(graph))
        exact, dense = self._numbers(graph), self._numbers(graph, dense=True)
        backward = _backward(graph)
        found = []
        if [dense[node] for node in effects] != self._effects:
            wrong = [n.name for n, b in zip(effects, self._effects, strict=False) if dense[n] != b]
            found.append(f"computed in another way: {', '.join(wrong) or 'number of outputs'}")
        prunes = graph.find_nodes(op="call_function", target=PRUNE_NM)
        decided = sum(decision.pruned for decision in decisions)
        if len(prunes) != decided:
            found.append(f"{len(prunes)} prunes where {decided} were decided")
        for prune in prunes:
            if prune not in backward:
                found.append(f"{prune.name} prunes what is no gradient")
            found += _misuses(prune, config)
        gradients = [
            exact[node] == before
            for node, before in zip(effects, self._effects, strict=False)
            if node in backward
        ]
        return Result(found, len(gradients), sum(gradients))

    def _numbers(self, graph: fx.Graph, dense: bool = False) -> dict[fx.Node, int]:
        """Number what each node computes: two have the same number if they compute the same.

        The halves of a convolution_backward compute what the whole did, and a matrix is
        transposed by any of the operators that do it. A draw of random numbers is like no other.

        Args:
            dense: Take a prune for the identity.
        """
        numbers: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if dense and node.target is PRUNE_NM:
                numbers[node] = numbers[node.args[0]]
            else:
                numbers[node] = self._known.setdefault(_key(node, numbers), len(self._known))
        return numbers


def _key(node: fx.Node, numbers: dict[fx.Node, int]) -> Any:
    if node.op in ("placeholder", "get_attr"):
        return node.op, node.target
    if _transposes(node):
        return "transpose", numbers[node.all_input_nodes[0]]
    args: Any = node.args
    if node.target is operator.getitem and args[0].target is CONVOLUTION_BACKWARD:
        args = (args[0].args[:_MASK], args[1])
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.target, is_random and node.name, _hashable((args, node.kwargs), numbers)


def _hashable(value: Any, numbers: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item, numbers) for item in value)
    if isinstance(value, dict):
        return tuple((name, _hashable(item, numbers)) for name, item in value.items())
    return type(value), repr(value)


def _effects(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that a graph returns, and those that mutate something."""
    for node in graph.nodes:
        if node.op == "output":
            yield from (operand for operand in node.args[0] if isinstance(operand, fx.Node))
        elif node.op != "placeholder" and node.is_impure():
            yield node


def _backward(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of the backward: gradients, and what they are computed from."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        # AOTAutograd names a joint graph's tangents so.
        is_tangent = node.op == "placeholder" and node.target.startswith("tangents")
        if is_tangent or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _misuses(prune: fx.Node, config: SDGPConfig) -> Iterator[str]:
    """Yield how a prune is configured or read as it must not be."""
    _, *settings, groups = prune.args
    if settings != [None, config.n, config.m, config.prune, config.rescale]:
        yield f"{prune.name} has settings {settings}"
    for user in prune.users:
        if user.target is CONVOLUTION_BACKWARD:
            operands = [i for i, operand in enumerate(user.args) if operand is prune]
            product = user.args[_GROUPS], list(cast(Any, user.args[_MASK]))
            right = operands == [0] and product == (groups, _INPUT_ONLY)
        elif _transposes(user):
            right = bool(groups == 1) and all(
                product.target is MM and product.args[0] is not user for product in user.users
            )
        else:
            right = bool(groups == 1) and user.target is MM and user.args[1] is not prune
        if not right:
            yield f"{prune.name} is read by {user.format_node()}"


def _transposes(node: fx.Node) -> bool:
    """Return whether node is the transpose of a matrix."""
    if node.target is aten.permute.default:
        return list(cast(Any, node.args[1])) == [1, 0]
    return node.target is aten.t.default
