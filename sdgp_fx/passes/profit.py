"""Where pruning is expected to save time: a rule on shapes and device, the same on every rank."""

from __future__ import annotations

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
        mac: Per multiply-add that it makes: it loads a vector for each.
        value: Per value of grad_output, which is pruned and packed.
        call: Per layer.
    """

    mac: float
    value: float
    call: float


SPARSE_COST = {"cpu": SparseCost(1.35, 60, 1e6)}


def is_sparse_faster(layer: Layer, config: SDGPConfig) -> bool:
    """Whether the product that skips zeros is expected to take less time than the dense one.

    Symbolic sizes count as large ones. Nothing is known against it on a device without costs.
    """
    grad_output = layer.grad_output.meta["val"]
    cost = SPARSE_COST.get(grad_output.device.type)
    if cost is None:
        return True
    values, most = grad_output.numel(), 1 - cost.mac * config.n / config.m
    least = cost.value + (cost.call / max(values, 1) if isinstance(values, int) else 0)
    return statically_known_true(layer.macs_per_grad_value * most > least)
