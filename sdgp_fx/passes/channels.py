"""Prune whole channels: the product reads fewer channels, densely.

    index, factor = the n largest of every m channels of gO, by their L1 norms
    gx = the product of gO[:, index] * factor and w[index]

How the channels are chosen is said in `kernels.channels`. Its functions are traced into the graph:
the compiler sees reductions, a sort and pointwise operators.
"""

from __future__ import annotations

from torch import Tensor, fx

from ..config import SDGPConfig
from ..kernels import channels
from .graph import is_channels_last, trace
from .layers import Layer


def count_random_numbers(layer: Layer, config: SDGPConfig) -> int:
    """Count the random numbers that `prune_channels` takes."""
    return {"random": layer.channels, "mvue": layer.channels // config.m}.get(config.prune, 0)


def prune_channels(
    layer: Layer, random_numbers: fx.Node | None, config: SDGPConfig
) -> tuple[fx.Node, fx.Node]:
    """Select n of every m channels of the batch.

    Args:
        random_numbers: int64, as many as `count_random_numbers` says; None for none.

    Returns:
        The grad_output and the weight that compute the layer's input gradient: the channels kept.
    """
    dim, is_last = layer.channel_dim, is_channels_last(layer.grad_output)

    def prune(grad_output: Tensor, weight: Tensor, *draw: Tensor) -> tuple[Tensor, Tensor]:
        norms = channels.channel_norms(grad_output, dim)
        index, factor = channels.select_channels(norms, config.n, config.m, config.prune, *draw)
        kept = channels.take_channels(grad_output, index, dim, is_last)
        if factor is not None:
            kept = channels.scale_channels(kept, factor, dim)
        return kept, layer.take_outputs(weight, index)

    draw = () if random_numbers is None else (random_numbers,)
    return trace(prune, (layer.grad_output, layer.weight, *draw), layer.node)
