"""Record how far every pruned gradient p is from the dense one g, in the graph that prunes it.

    p = sdgp.prune_nm(g, ...)
    sum|g|, sum|g| where p != 0, sum g^2, sum (p - g)^2, sum p g          of every layer
    sdgp.record([...], step, ...)

step is that of the forward, which reads it and saves it like an activation. The sums are ordinary
operators: Inductor computes all of a layer's in one loop over g and p.
"""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import quote, unquote

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from ..kernels.op import PRUNE_NM
from ..kernels.record import RECORD, STEP
from ..kernels.reference import accumulation_dtype
from ..kernels.sparse.op import PRUNED_INPUT_GRAD
from .graph import add_call, compute
from .marks import COMPUTES, DECISION, FACTOR_IN_WEIGHT

aten = torch.ops.aten

SUMS = ("norm", "kept_norm", "square", "squared_error", "product")


def record_statistics(graph: fx.Graph, key: str) -> None:
    """Add SUMS of every pruned gradient to a graph that went through `prune_input_grads`.

    A graph that nothing is pruned in, and one that records already, are left as they are.

    Args:
        key: Key of the receiver in `kernels.record`. It gets the layers' names, to be read by
            `layers_recorded`, and their sums one layer after the other.
    """
    if graph.find_nodes(op="call_function", target=RECORD):
        return
    # What is pruned, and what reads it, in the order in which they are computed.
    pruned = []
    for node in list(graph.nodes):
        if node.target is PRUNE_NM:
            pruned.append((node, next(iter(node.users))))
        elif node.target is PRUNED_INPUT_GRAD:
            pruned.append((_prune_again(node), node))
    if not pruned:
        return
    sums = [total for node, reader in pruned for total in _sums(node, reader)]
    # Quotation marks would end the string in the code that Inductor's cpp_wrapper writes.
    layers = ",".join(quote(_layer_name(node), safe=".") for node, _ in pruned)
    step = _step(graph, key, pruned[-1][0].meta["val"])
    add_call(RECORD, (sums, step, key, layers), None, pruned[-1][1])
    graph.lint()


def layers_recorded(layers: str) -> list[str]:
    """Return the names of layers from what a graph gives a receiver."""
    return list(map(unquote, layers.split(",")))


def _step(graph: fx.Graph, key: str, like: Tensor) -> fx.Node:
    """Read the receiver's step at the start of the forward, on the device of like.

    The partitioner is told not to read it again in the backward.
    """
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        step = graph.call_function(STEP, (key, like.device))
    step.meta = {
        "val": like.new_empty((), dtype=torch.int64),
        "recompute": CheckpointPolicy.MUST_SAVE,
    }
    return step


def _layer_name(pruned: fx.Node) -> str:
    while DECISION not in pruned.meta:  # On what the product reads, which may be a view.
        pruned = next(iter(pruned.users))
    name: str = pruned.meta[DECISION].module
    return name


def _prune_again(product: fx.Node) -> fx.Node:
    """Compute what a product that skips zeros multiplies: it has the same values, bit for bit."""
    grad_output, _, *settings = product.args[:7]
    arguments = (grad_output, *settings, product.args[-1])
    pruned = compute(PRUNE_NM, arguments, product)
    pruned.meta[DECISION] = product.meta[COMPUTES]
    if FACTOR_IN_WEIGHT in product.meta:
        pruned.meta[FACTOR_IN_WEIGHT] = product.meta[FACTOR_IN_WEIGHT]
    return pruned


def _sums(pruned: fx.Node, source: fx.Node) -> list[fx.Node]:
    """Compute SUMS, in float32 or float64, ahead of source, which reads the pruned gradient."""
    dense = cast(fx.Node, pruned.args[0])

    def call(target: Any, *args: Any) -> fx.Node:
        return compute(target, args, source)

    g, p = (_converted(node, source) for node in (dense, pruned))
    factor = pruned.meta.get(FACTOR_IN_WEIGHT)
    if factor is not None:
        along_channels = [1, -1, *[1] * (dense.meta["val"].dim() - 2)]
        p = call(aten.mul.Tensor, p, call(aten.view.default, factor, along_channels))
    size, error = call(aten.abs.default, g), call(aten.sub.Tensor, p, g)
    is_kept = call(aten.ne.Scalar, p, 0)
    factors = ((size, is_kept), (g, g), (error, error), (p, g))
    products = [call(aten.mul.Tensor, *pair) for pair in factors]
    return [call(aten.sum.default, values) for values in (size, *products)]


def _converted(node: fx.Node, source: fx.Node) -> fx.Node:
    dtype = node.meta["val"].dtype
    wanted = accumulation_dtype(dtype)
    if dtype == wanted:
        return node
    return compute(torch.ops.prims.convert_element_type.default, (node, wanted), source)
