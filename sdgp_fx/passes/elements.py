"""Prune elements of a layer: its input gradient from a grad_output with zeros in it.

Rescaled magnitude with scope "channel" needs sums over all of gO, which a kernel that produces gO
doesn't have while it prunes. But the input gradient is linear in each output channel: the weight
takes the channels' factors, and the prune that is left needs one group at a time.

    p  = sdgp.prune_nm(gO, ..., "magnitude", ...)
    wf = w * sdgp.channel_factor(gO, ...)
    gx = the product, of p and wf
"""

from __future__ import annotations

import torch
from torch import fx

from ..config import SDGPConfig
from ..kernels.op import CHANNEL_FACTOR, PRUNE_NM
from . import linears
from .graph import add_call, compute
from .layers import Layer

# A channel that keeps next to nothing may have any factor. A kept value times it stays below the
# channel's sum, but a weight could become infinite, and NaN times the zeros of the gradient.
LARGEST_FACTOR = 2.0**64


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
