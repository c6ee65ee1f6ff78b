"""Tell the backward of a joint graph from everything else that computes gradients.

joint graph      forward     gradients that the compiled function takes itself: values
                 backward    what `loss.backward()` computes, and what is pruned
branch or loop   of torch.cond and the like, a graph of its own in the forward or the backward
other graphs     inference, a step with torch.func.grad in it, and compiled autograd's, whose
                 layers have been in a joint graph before
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._functorch import eager_transforms
from torch._ops import HigherOrderOperator

# AOTAutograd tags what it traces while it differentiates a function, or a branch of it.
_TAG = "partitioner_tag"
_BACKWARD_TAGS = ("is_backward", "must_be_in_backward")

# Dynamo notes these as the source of gradients that the compiled function takes.
_TAKE_GRADIENTS = (eager_transforms._autograd_grad, torch.autograd.grad)


class Part(NamedTuple):
    """A graph, and which of its nodes belong to the backward of the joint graph.

    Attributes:
        operands: Of a branch or loop: what the graphs around it give for inputs, theirs included.
    """

    graph: fx.Graph
    backward: set[fx.Node]
    operands: Mapping[fx.Node, fx.Node]


def find_parts(graph: fx.Graph) -> list[Part]:
    """Return a graph with the branches and loops in it, each once.

    There are none for a graph that is not looked at by itself: a branch of a joint graph, which
    Inductor hands over ahead of that, and a graph of compiled autograd.
    """
    is_joint = bool(tangents_of(graph))
    if not is_joint and torch._dynamo.compiled_autograd.in_compiled_autograd_region:
        return []
    if not is_joint and any(_is_tagged(node) for node in graph.nodes):
        return []
    parts = [Part(graph, backward_nodes(graph) if is_joint else set(), {})]
    seen = {graph}
    for part in parts:
        for node in part.graph.nodes:
            for inner, operands in inner_graphs(node):
                # One with tangents, of a region compiled once, comes as a joint graph of its own.
                if inner not in seen and not tangents_of(inner):
                    backward = backward_nodes(inner) if node in part.backward else set()
                    parts.append(Part(inner, backward, {**part.operands, **operands}))
                seen.add(inner)
    return parts


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of a joint graph's backward.

    What depends on a tangent needs no tag: another pass has made it, or it is the backward of a
    torch.autograd.Function. The derivatives of gradients that the function takes are left out.
    """
    backward = set(tangents_of(graph))
    for node in graph.nodes:
        if _is_tagged(node) or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
    return {
        node for node in backward if _source(node, "fwd_source_fn_stack") not in _TAKE_GRADIENTS
    }


def is_taken_inside(node: fx.Node) -> bool:
    """Whether the compiled function takes a gradient by this node, and knows it as one."""
    return source_of(node) in _TAKE_GRADIENTS


def source_of(node: fx.Node) -> Any:
    """Return the function, or the class of torch.nn, that Dynamo traced a node from."""
    return _source(node, "source_fn_stack")


def _source(node: fx.Node, key: str) -> Any:
    stack = node.meta.get(key)
    return stack[-1][1] if stack else None


def _is_tagged(node: fx.Node) -> bool:
    return node.meta.get(_TAG) in _BACKWARD_TAGS


def tangents_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs that are gradients of outputs, which AOTAutograd names so."""
    return [n for n in graph.find_nodes(op="placeholder") if n.target.startswith("tangents")]


def inner_graphs(node: fx.Node) -> Iterator[tuple[fx.Graph, dict[fx.Node, fx.Node]]]:
    """Yield the graphs that an operator of higher order runs, with what it gives for inputs."""
    if not isinstance(node.target, HigherOrderOperator):
        return
    arguments: list[fx.Node] = []
    fx.map_arg(node.args, arguments.append)
    operands = [argument for argument in arguments if argument.op != "get_attr"]
    for argument in arguments:
        if argument.op != "get_attr":
            continue
        inner = getattr(node.graph.owning_module, str(argument.target), None)
        if isinstance(inner, fx.GraphModule):
            inputs = inner.graph.find_nodes(op="placeholder")
            # A condition comes ahead of what a branch gets.
            given = operands[len(operands) - len(inputs) :] if len(inputs) <= len(operands) else []
            yield inner.graph, dict(zip(inputs, given, strict=False))
