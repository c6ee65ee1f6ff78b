"""Prune whole channels of a layer: its input gradient from fewer channels, densely.

    index, factor = the n largest of every m channels of gO, by their L1 norms
    gx = the product with the weight that computed it from gO, of gO[:, index] * factor and w[index]

How the channels are chosen is said in `kernels.channels`. Its functions are traced into the graph:
the compiler sees reductions, a sort and pointwise operators.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import SDGPConfig
from ..kernels import channels
from .graph import trace
from .layers import Layer


class Cost(NamedTuple):
    """What the choice of channels costs, in multiplications of the product that it saves.

    value: for each value of grad_output, which is read for its norm and to be gathered.
    kept: for each that is kept, which is written and read.
    weight: for each value of the weight that is kept.
    call: for what is launched, and for a product that is no longer computed in one call with the
        weight gradient's.
    """

    value: float
    kept: float
    weight: float
    call: float


# That of a CPU is estimated from times on AMD EPYC in float32, of one thread (AVX2), and half as
# much again, as a smaller product runs at a lower rate; a call's of two threads (AVX-512). That of
# a GPU is calculated for bfloat16 from bytes, with those of a read for the norms, which may be
# fused: 395e12 multiplications and 4.3e12 bytes a second, and 12 microseconds for all launches.
COST = {"cpu": Cost(35, 80, 55, 1e7), "cuda": Cost(184, 368, 368, 5e9)}


def pays(layer: Layer, config: SDGPConfig) -> bool:
    """Whether the smaller product saves more than the choice of channels is likely to cost.

    The same on every rank, as it depends on nothing but shapes. Symbolic ones count as large.
    """
    grad_output, weight = (node.meta["val"] for node in (layer.grad_output, layer.weight))
    cost, kept = COST.get(grad_output.device.type, COST["cuda"]), config.n / config.m
    least = cost.value + cost.kept * kept
    values, weights = grad_output.numel(), weight.numel()
    if isinstance(values, int) and isinstance(weights, int):
        least += (cost.weight * kept * weights + cost.call) / max(values, 1)
    return statically_known_true(layer.uses * (1 - kept) >= least)


def draws(layer: Layer, config: SDGPConfig) -> int:
    """How many random numbers the choice of channels takes."""
    return {"random": layer.channels, "mvue": layer.channels // config.m}.get(config.prune, 0)


def prune_channels(
    layer: Layer, draw: fx.Node | None, config: SDGPConfig
) -> tuple[fx.Node, fx.Node]:
    """The channels that are kept, of the layer's grad_output and of its weight.

    draw: int64, as many numbers as `draws` says.
    """
    dim = layer.channel_dim
    last = _is_channels_last(layer.grad_output), _is_channels_last(layer.weight)

    def prune(grad_output: Tensor, weight: Tensor, *draw: Tensor) -> tuple[Tensor, Tensor]:
        norms = channels.channel_norms(grad_output, dim)
        index, factor = channels.select_channels(norms, config.n, config.m, config.prune, *draw)
        kept = channels.take_channels(grad_output, index, dim, last[0])
        if factor is not None:
            factor = factor.view(-1, *[1] * (kept.dim() - 1 - dim))
            kept = (kept * factor).to(grad_output.dtype)
        return kept, _take_outputs(weight, index, layer, last[1])

    operands = (layer.grad_output, layer.weight, *([] if draw is None else [draw]))
    return trace(prune, operands, layer.node)


def _take_outputs(weight: Tensor, index: Tensor, layer: Layer, is_channels_last: bool) -> Tensor:
    if layer.kind == "linear" and weight.dim() == 3:  # One matrix, expanded to a batch.
        taken = channels.take_channels(weight[0], index, 0, False)
        return taken.expand(len(weight), -1, -1)
    if not layer.transposed or layer.groups == 1:
        dim = 1 if layer.transposed else 0
        return channels.take_channels(weight, index, dim, is_channels_last)
    # (groups, C_in / groups, C_out / groups, *kernel), and C_out as one dimension.
    by_group = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
    taken = channels.take_channels(by_group.flatten(0, 1), index, 0, False)
    return taken.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def _is_channels_last(node: fx.Node) -> bool:
    value = node.meta["val"]
    return value.dim() > 2 and statically_known_true(value.stride(1) == 1)
