"""Where pruning is expected to save time: a rule on shapes and device, the same on every rank."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import SDGPConfig
from .layers import Layer


class Cost(NamedTuple):
    """What selecting channels costs, in multiply-adds of the product that it makes smaller.

    Attributes:
        value: Per value of grad_output, which is read for its norm and to be gathered.
        kept: Per value that is kept, which is written and read.
        weight: Per value of the weight that is kept.
        call: Per layer, for what is launched, and for a product that is no longer computed in one
            call with the weight gradient's.
    """

    value: float
    kept: float
    weight: float
    call: float


# The CPU's is estimated from times on AMD EPYC in float32 with one thread (AVX2), and half as much
# again, as a smaller product runs at a lower rate; its call is of two threads (AVX-512). The GPU's
# is calculated for bfloat16 from bytes, including a read for the norms, which may be fused:
# 395e12 multiply-adds and 4.3e12 bytes a second, and 12 microseconds for all launches.
COST = {"cpu": Cost(35, 80, 55, 1e7), "cuda": Cost(184, 368, 368, 5e9)}


def is_profitable(layer: Layer, config: SDGPConfig) -> bool:
    """Whether pruning the layer is expected to save more time than it takes.

    Symbolic sizes count as large ones; a device without costs of its own is taken for a GPU.
    """
    if config.structure == "element":
        return is_sparse_faster(layer, config)
    grad_output, weight = (node.meta["val"] for node in (layer.grad_output, layer.weight))
    cost, kept = COST.get(grad_output.device.type, COST["cuda"]), config.n / config.m
    least = cost.value + cost.kept * kept
    values, weights = grad_output.numel(), weight.numel()
    if isinstance(values, int) and isinstance(weights, int):
        least += (cost.weight * kept * weights + cost.call) / max(values, 1)
    return statically_known_true(layer.macs_per_grad_value * (1 - kept) >= least)


class SparseCost(NamedTuple):
    """What a product that skips zeros costs, in multiply-adds of the dense one.

    Attributes:
        mac: Per multiply-add that it makes, which loads a vector.
        value: Per value of grad_output, which is pruned and packed.
        result: Per value of the input gradient, which is summed in memory and copied.
        pair: Per position of the input gradient, tap and block of input channels: a sum is loaded
            and stored.
        weight: Per value of the weight, which is packed.
        call: Per layer.
        block: Input channels of a block.
    """

    mac: float
    value: float
    result: float
    pair: float
    weight: float
    call: float
    block: int


# Estimated from times on AMD EPYC in float32 with two threads (AVX2), 2:4, 1:4 and 2:16. What is
# saved has to be more than MARGIN of the product.
SPARSE_COST = {"cpu": SparseCost(1.5, 45, 30, 150, 40, 5e5, 64)}
MARGIN = 0.03


def is_sparse_faster(layer: Layer, config: SDGPConfig) -> bool:
    """Whether the product that skips zeros is expected to take less time than the dense one.

    Symbolic sizes count as large ones. Nothing is known against it on a device without costs.
    """
    grad_output, weight = (node.meta["val"] for node in (layer.grad_output, layer.weight))
    cost = SPARSE_COST.get(grad_output.device.type)
    if cost is None:
        return True
    values, results, weights = grad_output.numel(), layer.input_grad.numel(), weight.numel()
    channels = layer.input.meta["val"].shape[layer.channel_dim] // layer.groups
    taps = math.prod(weight.shape[2:])
    blocks = -(-channels // cost.block)
    least = cost.mac * layer.macs * config.n / config.m + cost.value * values
    least += cost.result * results + cost.pair * taps * blocks * (results // channels)
    if isinstance(values, int) and isinstance(weights, int):
        least += cost.weight * weights + cost.call
    return statically_known_true(least <= layer.macs * (1 - MARGIN))
