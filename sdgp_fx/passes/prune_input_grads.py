"""Prune the output gradient of every layer, ahead of its input gradient only.

    p  = sdgp.prune_nm(gO, ...)
    gx = the product with the weight that computed it from gO, of p

The weight gradient keeps the dense gO (McDanel et al. 2022, section III). What the layers are in
the graph is said in `convolutions` and `linears`.

Rescaled magnitude with scope "channel" needs sums over all of gO, which a kernel that produces gO
doesn't have while it prunes. But the input gradient is linear in each output channel: the weight
takes the channels' factors, and the prune that is left needs one group at a time.

    p  = sdgp.prune_nm(gO, ..., "magnitude", ...)
    wf = w * sdgp.channel_factor(gO, ...)
    gx = the product, of p and wf

With `sdgp.structure` whole channels are pruned instead, see `channels`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import SDGPConfig
from ..kernels import op
from ..kernels.op import CHANNEL_FACTOR, PRUNE_NM
from . import channels, linears
from .convolutions import find_convolutions
from .layers import DECISION, Layer, add_call, compute, plain_sizes

# A channel that keeps next to nothing may have any factor. A kept value times it stays below the
# channel's sum, but a weight could become infinite, and NaN times the zeros of the gradient.
LARGEST_FACTOR = 2.0**64

NO_INPUT_GRADIENT = "no input gradient"
KEEPS_ALL = "n = m keeps every value"
EXCLUDED = "excluded by a rule"
DTYPE = "dtype not supported"
DEPTHWISE = "depthwise, one output channel a group"
NOT_A_MULTIPLE = "C_out per group is not a multiple of m"
NOT_STATIC = "number of channels not known when compiled"
DOES_NOT_PAY = "pruning whole channels would not pay"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What became of one layer.

    module: the layer's name in `named_modules()`; that of the module around it for a layer
        without a module of its own, "" for the compiled module itself. A module that is
        registered under several names may go by any of them.
    kind: "conv" or "linear".
    grad_output: shape (N, C_out, *spatial), of a linear layer (rows, out_features), or
        (batch, rows, out_features); a symbolic size is its symbol's name.
    weight: shape (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) if
        transposed. As it is multiplied with: that of a linear layer may be either.
    reason: why the layer stays dense; "" if it is pruned.
    """

    module: str
    kind: str
    grad_output: tuple[int | str, ...]
    weight: tuple[int | str, ...]
    groups: int
    transposed: bool
    pruned: bool
    reason: str


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


def _reason_dense(layer: Layer, module: str, config: SDGPConfig) -> str:
    """Why this layer can't be pruned; "" if it can, or is."""
    if layer.is_pruned:
        return ""
    grad_output = layer.grad_output.meta["val"]
    if not layer.has_input_grad:
        return NO_INPUT_GRADIENT
    if config.n == config.m:
        return KEEPS_ALL
    if not config.selects(module):
        return EXCLUDED
    if not op.supports_dtype(grad_output.dtype, grad_output.device):
        return DTYPE
    if layer.kind == "conv" and statically_known_true(layer.channels == layer.groups):
        return DEPTHWISE
    if not statically_known_true(layer.channels % (layer.groups * config.m) == 0):
        return NOT_A_MULTIPLE
    if config.structure != "element" and not isinstance(layer.channels, int):
        return NOT_STATIC
    if config.structure == "channel" and not channels.pays(layer, config):
        return DOES_NOT_PAY
    return ""


def _rewrite(layer: Layer, seed: fx.Node | None, config: SDGPConfig) -> None:
    """Compute the layer's input gradient from its pruned grad_output."""
    grad_output, prune, weight = layer.grad_output, config.prune, layer.weight
    if _folds_factor(layer, config):
        prune, weight = "magnitude", _scaled_weight(layer, config)
    apart = linears.features_second(layer) if _needs_own_form(layer, config) else None
    if apart is not None:
        grad_output = apart
    pruned = add_call(
        PRUNE_NM,
        (grad_output, seed, config.n, config.m, prune, config.rescale, layer.groups),
        torch.empty_like(grad_output.meta["val"]),
        layer.node,
    )
    layer.feed(linears.features_last(pruned, layer) if apart is not None else pruned, weight)


def _needs_own_form(layer: Layer, config: SDGPConfig) -> bool:
    """Whether a layer can't be pruned in the rows that it is multiplied as.

    Only scope "feature_map" tells positions from samples, both of which are rows. Of a batch of
    products, features are the last of three dimensions.
    """
    by_position = config.prune == "rescaled_magnitude" and config.rescale == "feature_map"
    return layer.kind == "linear" and (by_position or linears.is_batched(layer))


def _folds_factor(layer: Layer, config: SDGPConfig) -> bool:
    """Whether the weight takes the factors of the rescaled magnitude.

    Not in float16, where ordinary factors can carry a weight past its range. In float64 there is
    nothing to gain: no fused prune takes it. The output channels of a transposed convolution in
    groups lie in two dimensions of its weight, which is not worth the views.
    """
    return (
        config.prune == "rescaled_magnitude"
        and config.rescale == "channel"
        and layer.grad_output.meta["val"].dtype in (torch.float32, torch.bfloat16)
        and not (layer.transposed and layer.groups > 1)
        and not (layer.kind == "linear" and linears.is_batched(layer))
    )


def _scaled_weight(layer: Layer, config: SDGPConfig) -> fx.Node:
    """The layer's weight times its output channels' factors, multiplied in float32."""
    weight = layer.weight.meta["val"]
    along_outputs = [1] * weight.dim()
    along_outputs[1 if layer.transposed else 0] = -1
    node = layer.node
    factor = compute(CHANNEL_FACTOR, (layer.grad_output, config.n, config.m), node)
    factor = compute(torch.ops.aten.clamp_max.default, (factor, LARGEST_FACTOR), node)
    factor = compute(torch.ops.aten.view.default, (factor, along_outputs), node)
    scaled = compute(torch.ops.aten.mul.Tensor, (layer.weight, factor), node)
    return compute(torch.ops.prims.convert_element_type.default, (scaled, weight.dtype), node)


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


def _decide(layer: Layer, module: str, config: SDGPConfig) -> Decision:
    if DECISION in layer.grad_output.meta:
        return cast(Decision, layer.grad_output.meta[DECISION])
    reason = _reason_dense(layer, module, config)
    weight = plain_sizes(layer.weight.meta["val"].shape)
    return Decision(
        module=module,
        kind=layer.kind,
        grad_output=plain_sizes(layer.grad_output.meta["val"].shape),
        weight=weight[-2:] if layer.kind == "linear" else weight,
        groups=layer.groups,
        transposed=layer.transposed,
        pruned=not reason,
        reason=reason,
    )
