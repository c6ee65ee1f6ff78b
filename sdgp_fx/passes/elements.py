"""Prune elements: the product reads a grad_output of the same shape, with zeros in it.

    p  = sdgp.prune_nm(gO, ...)

Rescaled magnitude with scope "channel" needs sums over all of gO, which a kernel that produces gO
doesn't have while it prunes. But the input gradient is linear in each output channel: the weight
takes the channels' factors, and the prune that is left needs one group at a time.

    p  = sdgp.prune_nm(gO, ..., "magnitude", ...)
    wf = w * sdgp.channel_factor(gO, ...)
"""

from __future__ import annotations

import torch
from torch import fx

from ..config import SDGPConfig
from ..kernels import op
from ..kernels.op import CHANNEL_FACTOR, PRUNE_NM
from .graph import add_call, compute
from .layers import Layer
from .marks import FACTOR_IN_WEIGHT

# A channel that keeps next to nothing may have any factor. A kept value times it stays below the
# channel's sum, but a weight could become infinite, and NaN times the zeros of the gradient.
LARGEST_FACTOR = 2.0**64


def count_random_numbers(layer: Layer, config: SDGPConfig) -> int:
    """Count the random numbers that `prune_elements` takes: a seed, or none."""
    return int(config.prune in op.STOCHASTIC)


def prune_elements(
    layer: Layer, random_numbers: fx.Node | None, config: SDGPConfig
) -> tuple[fx.Node, fx.Node]:
    """Prune n:m within each group of channels.

    Args:
        random_numbers: int64, as many as `count_random_numbers` says; None for none.

    Returns:
        The grad_output and the weight that compute the layer's input gradient.
    """
    prune, weight, factor = config.prune, layer.weight, None
    if _folds_factor(layer, config):
        factor = _channel_factor(layer, config)
        prune, weight = "magnitude", _scaled_weight(layer, factor)
    # prune_nm wants channels second. Rows of a linear layer are positions as well as samples,
    # which matters to nothing but scope "feature_map".
    scope = config.rescale if config.prune == "rescaled_magnitude" else ""
    takes_rows = layer.channel_dim == 1 and scope != "feature_map"
    grad_output = layer.grad_output if takes_rows else layer.channels_second()
    pruned = add_call(
        PRUNE_NM,
        (grad_output, random_numbers, config.n, config.m, prune, config.rescale, layer.groups),
        torch.empty_like(grad_output.meta["val"]),
        layer.node,
    )
    if factor is not None:
        pruned.meta[FACTOR_IN_WEIGHT] = factor
    if grad_output is not layer.grad_output:
        pruned = layer.as_grad_output(pruned)
    return pruned, weight


def _folds_factor(layer: Layer, config: SDGPConfig) -> bool:
    """Whether the weight takes the factors of the rescaled magnitude.

    Not in float16, where ordinary factors can carry a weight past its range. In float64 there is
    nothing to gain: no fused prune takes it.
    """
    return (
        config.prune == "rescaled_magnitude"
        and config.rescale == "channel"
        and layer.grad_output.meta["val"].dtype in (torch.float32, torch.bfloat16)
        and layer.can_scale_outputs
    )


def _channel_factor(layer: Layer, config: SDGPConfig) -> fx.Node:
    """Compute the factors (C_out,) that keep the channels' L1 norms."""
    factor = compute(CHANNEL_FACTOR, (layer.grad_output, config.n, config.m), layer.node)
    return compute(torch.ops.aten.clamp_max.default, (factor, LARGEST_FACTOR), layer.node)


def _scaled_weight(layer: Layer, factor: fx.Node) -> fx.Node:
    """Multiply the output channels of the layer's weight by factor, in float32."""
    weight = layer.weight.meta["val"]
    along_outputs = [1] * weight.dim()
    along_outputs[1 if layer.transposed else 0] = -1
    factor = compute(torch.ops.aten.view.default, (factor, along_outputs), layer.node)
    scaled = compute(torch.ops.aten.mul.Tensor, (layer.weight, factor), layer.node)
    return compute(torch.ops.prims.convert_element_type.default, (scaled, weight.dtype), layer.node)
