"""Prune the output gradient of every layer, ahead of its input gradient only.

    p  = sdgp.prune_nm(gO, ...)
    gx = the product with the weight that computed it from gO, of p

The weight gradient keeps the dense gO (McDanel et al. 2022, section III). What the layers are in
the graph is said in `convolutions` and `linears`.

How elements are pruned is said in `elements`. With `sdgp.structure` whole channels are pruned
instead, see `channels`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

import torch
from torch import fx

from ..config import SDGPConfig
from ..kernels import op
from . import channels, linears
from .convolutions import find_convolutions
from .decisions import Decision, _decide
from .elements import _rewrite
from .graph import add_call, compute
from .layers import DECISION, Layer


def prune_input_grads(
    graph: fx.Graph, config: SDGPConfig, roots: Collection[str] = ()
) -> list[Decision]:
    """Rewrite graph in place; return a Decision for each layer, in the graph's order.

    graph: ATen operators with `meta["val"]`, such as AOTAutograd's joint graph. A graph that
    has been rewritten before is left as it is, with the same decisions.
    roots: `module_roots` of Dynamo's graph, from which the layers' names start.
    """
    layers = find_layers(graph, config)
    decisions = [_decide(layer, layer.module(roots), config) for layer in layers]
    to_prune = {
        layer.node: (layer, decision)
        for layer, decision in zip(layers, decisions, strict=True)
        if decision.pruned and not layer.is_pruned
    }
    drawn = _draw([layer for layer, _ in to_prune.values()], config)
    for node, (layer, decision) in to_prune.items():
        if config.structure == "element":
            _rewrite(layer, drawn.get(node), config)
        else:
            grad_output, weight = channels.prune_channels(layer, drawn.get(node), config)
            grad_output.meta[DECISION] = decision
            layer.feed(grad_output, weight)
    if to_prune:
        graph.eliminate_dead_code()
        graph.lint()
    return decisions


def find_layers(graph: fx.Graph, config: SDGPConfig) -> list[Layer]:
    """The layers of the kinds that config targets, in the graph's order."""
    kinds = config.targets.split(",")
    layers = find_convolutions(graph) if "conv" in kinds else []
    if "linear" in kinds:
        layers += linears.find_linears(graph)
        position = {node: i for i, node in enumerate(graph.nodes)}
        layers.sort(key=lambda layer: position[layer.node])
    return layers


def _draw(layers: list[Layer], config: SDGPConfig) -> dict[fx.Node, fx.Node]:
    """What each layer takes of random numbers, by its node, from one draw for each device.

    That is a seed, or as many numbers as the choice of channels takes. The draw is an ordinary
    random operator of the backward: it follows torch.manual_seed, and a captured CUDA graph
    replays it with fresh numbers.
    """
    if config.prune not in op.STOCHASTIC:
        return {}
    on_device: dict[torch.device, list[Layer]] = {}
    for layer in layers:
        on_device.setdefault(layer.grad_output.meta["val"].device, []).append(layer)
    numbers = {}
    for device, group in on_device.items():
        like = group[0].grad_output.meta["val"]
        counts = [
            1 if config.structure == "element" else channels.draws(layer, config) for layer in group
        ]
        ends = list(itertools.accumulate(counts))
        drawn = add_call(
            torch.ops.aten.randint.default,
            (2**63 - 1, [ends[-1]]),
            like.new_empty((ends[-1],), dtype=torch.int64),
            group[0].node,
            dtype=torch.int64,
            device=device,
            pin_memory=False,
        )
        for layer, count, end in zip(group, counts, ends, strict=True):
            part = (drawn, 0, end - count, end)
            numbers[layer.node] = compute(torch.ops.aten.slice.Tensor, part, layer.node)
    return numbers
