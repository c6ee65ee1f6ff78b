"""Prune the output gradient of every layer, ahead of its input gradient only.

    p  = gO, pruned
    gx = the product with the weight that computed it from gO, of p

The weight gradient keeps the dense gO (McDanel et al. 2022, section III). Where in a graph the
backward is, is said in `backward`; what the layers are in it, in `convolutions` and `linears`;
which of them are pruned, in `decisions`; what p and the weight are then, in `elements` and
`channels`; what multiplies them, in `products`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import fx

from ..config import SDGPConfig
from ..kernels.sparse.op import PRUNED_INPUT_GRAD
from .backward import Part, find_parts
from .channels import count_random_numbers as count_for_channels
from .channels import prune_channels
from .convolutions import find_convolutions
from .decisions import Decision, decide
from .elements import count_random_numbers as count_for_elements
from .elements import prune_elements
from .graph import add_call, compute
from .layers import Layer
from .linears import find_linears
from .marks import COMPUTES, DECISION
from .module_names import ModuleNames


class Structure(NamedTuple):
    """What `sdgp.structure` names: how a layer is pruned, and the random numbers that takes."""

    prune: Callable[[Layer, fx.Node | None, SDGPConfig], tuple[fx.Node, fx.Node]]
    count_random_numbers: Callable[[Layer, SDGPConfig], int]


STRUCTURES = {
    "element": Structure(prune_elements, count_for_elements),
    "channel": Structure(prune_channels, count_for_channels),
}
FINDERS: dict[str, Callable[[fx.Graph], Sequence[Layer]]] = {
    "conv": find_convolutions,
    "linear": find_linears,
}


def prune_input_grads(
    graph: fx.Graph,
    config: SDGPConfig,
    names: ModuleNames = ModuleNames(),  # noqa: B008 (It is frozen.)
    dense_half_first: Collection[str] = (),
) -> list[Decision]:
    """Rewrite a joint graph in place, with the branches and loops in it.

    Args:
        graph: ATen operators with `meta["val"]`, as AOTAutograd makes it. One that has been
            rewritten before is left as it is, with the same decisions.
        names: `module_names` of Dynamo's graph.
        dense_half_first: Device types on which a convolution's weight gradient comes ahead of the
            prune in the graph.

    Returns:
        A decision for each layer, in the graph's order; those of branches come last.
    """
    decisions = []
    for part in find_parts(graph):
        decided, is_changed = _rewrite(part, config, names, dense_half_first)
        decisions += decided
        if is_changed and part.graph is not graph and part.graph.owning_module is not None:
            part.graph.owning_module.recompile()
    return decisions


def _rewrite(
    part: Part, config: SDGPConfig, names: ModuleNames, dense_half_first: Collection[str]
) -> tuple[list[Decision], bool]:
    """Rewrite one graph; return the decisions, and whether it has changed."""
    structure, graph = STRUCTURES[config.structure], part.graph
    decided = {
        layer.node: decide(
            layer, names.of(layer, part.operands), config, layer.node in part.backward
        )
        for layer in find_layers(graph, config)
    }
    for product in graph.find_nodes(op="call_function", target=PRUNED_INPUT_GRAD):
        decided[product] = product.meta[COMPUTES]
    decisions = [decided[node] for node in graph.nodes if node in decided]
    to_prune = [
        (decision.layer, decision)
        for decision in decisions
        if decision.layer is not None and decision.pruned and decision.layer.pruned is None
    ]
    counts = {
        layer: count
        for layer, _ in to_prune
        if (count := structure.count_random_numbers(layer, config))
    }
    random_numbers = draw_random_numbers(counts)
    for layer, decision in to_prune:
        grad_output, weight = structure.prune(layer, random_numbers.get(layer), config)
        grad_output.meta[DECISION] = dataclasses.replace(decision, layer=None)
        layer.replace_operands(grad_output, weight)
        device = grad_output.meta["val"].device.type
        if layer.dense_half is not None and device in dense_half_first:
            grad_output.prepend(layer.dense_half)
    if to_prune:
        graph.eliminate_dead_code()
        graph.lint()
    return decisions, bool(to_prune)


def find_layers(graph: fx.Graph, config: SDGPConfig) -> list[Layer]:
    """Find the layers of the kinds that config targets, in the graph's order."""
    layers = [layer for kind in config.targets for layer in FINDERS[kind](graph)]
    position = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(layers, key=lambda layer: position[layer.node])


def draw_random_numbers(counts: dict[Layer, int]) -> dict[Layer, fx.Node]:
    """Insert one draw for each device, and give each layer its part.

    The draw is an ordinary random operator of the backward: it follows torch.manual_seed, and a
    captured CUDA graph replays it with fresh numbers.

    Args:
        counts: How many numbers each layer takes; layers that take none are left out.

    Returns:
        Each layer's int64 numbers, uniform in [0, 2**63 - 1).
    """
    by_device: dict[torch.device, list[Layer]] = {}
    for layer in counts:
        by_device.setdefault(layer.grad_output.meta["val"].device, []).append(layer)
    numbers = {}
    for device, layers in by_device.items():
        like = layers[0].grad_output.meta["val"]
        ends = list(itertools.accumulate(counts[layer] for layer in layers))
        drawn = add_call(
            torch.ops.aten.randint.default,
            (2**63 - 1, [ends[-1]]),
            like.new_empty((ends[-1],), dtype=torch.int64),
            layers[0].node,
            dtype=torch.int64,
            device=device,
            pin_memory=False,
        )
        for layer, end in zip(layers, ends, strict=True):
            part = (drawn, 0, end - counts[layer], end)
            numbers[layer] = compute(torch.ops.aten.slice.Tensor, part, layer.node)
    return numbers
