"""Where pruning is expected to save time: a rule on shapes and device, the same on every rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
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
        return is_sparse_faster(layer, config, or_not_pruned=True)
    grad_output, weight = (node.meta["val"] for node in (layer.grad_output, layer.weight))
    cost, kept = COST.get(grad_output.device.type, COST["cuda"]), config.n / config.m
    least = cost.value + cost.kept * kept
    values, weights = grad_output.numel(), weight.numel()
    if isinstance(values, int) and isinstance(weights, int):
        least += (cost.weight * kept * weights + cost.call) / max(values, 1)
    return statically_known_true(layer.macs_per_grad_value * (1 - kept) >= least)


class SparseCost(NamedTuple):
    """What a product that skips zeros costs, in multiply-adds of the dense one.

    Of values and calls, what it costs more than the dense one.

    Attributes:
        mac: Per multiply-add that it makes, which loads a vector. Channels are padded to whole
            vectors.
        value: Per value of grad_output, which is pruned and packed.
        choice: Per value of grad_output and per value kept of a group: each is chosen from all.
        pair: Per position of grad_output, tap, row and slab: sums are loaded and stored.
        call: Per layer.
        dense_of_matrices: Per multiply-add of a dense product of matrices.
    """

    mac: float
    value: float
    choice: float
    pair: float
    call: float
    dense_of_matrices: float = 1

    def pruning(self, config: SDGPConfig) -> float:
        """Return what it costs per value of grad_output to be pruned and packed."""
        return self.value + self.choice * config.n


# Fitted to times on AMD EPYC with two threads, of python -m benchmarks.products; those of AVX2 on
# the same machine, which has AVX-512, with both products restricted to AVX2. MKL takes twice as
# long for a multiply-add of float32 matrices there as oneDNN in a convolution. Less of it counts,
# since elsewhere it may not.
SPARSE_COST = SparseCost(1.15, 6, 6, 560, 1e6)
SPARSE_COSTS = {
    ("AVX512", torch.float32): SparseCost(1.36, 12, 8, 560, 1e6, dense_of_matrices=1.4),
    ("AVX512", torch.bfloat16): SparseCost(2.0, 30, 45, 1000, 2e6),
}

# What is saved has to be more than this part of the product.
MARGIN = 0.08

# The prune ahead of a dense product, which reads another tensor for it, takes about as long as
# pruning and packing. In groups of up to 4, whose values are not moved across vectors, it takes
# this part of it.
PRUNE_OF_FOURS = 0.7

# Of float32 in a vector of the CPU; vectors of a row of sums, and output channels of a slab, which
# kernels/sparse/pruned_input_grad.cpp chooses for each layer: about as many as here.
LANES = {"AVX512": 16, "AVX2": 8}
ROW_VECTORS = 8
SLAB_CHANNELS = 64


# Multiply-adds that a GPU makes while it moves the bytes of packing a value of grad_output, which
# is read, and written as 9/16 of it; in bfloat16, at the rates of COST. Sparse tensor cores make
# half of the multiply-adds, whatever n:m.
GPU_PACKING = 287


def is_sparse_faster(layer: Layer, config: SDGPConfig, or_not_pruned: bool = False) -> bool:
    """Whether the product that skips zeros is expected to take less time than the dense one.

    Symbolic sizes count as large ones. On a GPU that is the best case, calculated from bytes; what
    it takes has to be measured.

    Args:
        or_not_pruned: Whether the dense product would be one of the gradient as it is.
    """
    grad_output, weight = (node.meta["val"] for node in (layer.grad_output, layer.weight))
    if grad_output.device.type != "cpu":
        return statically_known_true(layer.macs_per_grad_value / 2 >= GPU_PACKING)
    capability, values = torch.backends.cpu.get_cpu_capability(), grad_output.numel()
    cost = SPARSE_COSTS.get((capability, grad_output.dtype), SPARSE_COST)
    in_channels = layer.input.meta["val"].shape[layer.channel_dim] // layer.groups
    out_channels = layer.channels // layer.groups
    lanes = LANES.get(capability, 4)
    vectors = -(-in_channels // lanes)
    macs = layer.macs * config.n / config.m * (vectors * lanes / in_channels)
    rows = -(-vectors // ROW_VECTORS) * -(-out_channels // SLAB_CHANNELS)
    pairs = values // out_channels * math.prod(weight.shape[2:]) * rows
    least = macs * cost.mac + values * cost.pruning(config) + pairs * cost.pair
    if isinstance(values, int):
        least += cost.call
    dense = layer.macs * (1.0 if len(layer.weight_shape) > 2 else cost.dense_of_matrices)
    if not or_not_pruned:
        dense += values * cost.pruning(config) * (PRUNE_OF_FOURS if config.m <= 4 else 1)
    return statically_known_true(least <= dense * (1 - MARGIN))
