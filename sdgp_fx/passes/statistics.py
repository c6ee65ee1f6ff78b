"""Record how far every pruned gradient p is from the dense one g, in the graph that prunes it.

    p = sdgp.prune_nm(g, ...)
    sum|g|, sum|g| where p != 0, sum g^2, sum (p - g)^2, sum p g          of every layer
    sdgp.record([...], ...)

The sums are ordinary operators: Inductor computes all of a layer's in one loop over g and p.
"""

from __future__ import annotations

import json
from typing import Any, cast

import torch
from torch import fx

from ..kernels.op import PRUNE_NM
from ..kernels.record import RECORD
from ..kernels.reference import accumulation_dtype
from .graph import add_call, compute
from .marks import DECISION, FACTOR_IN_WEIGHT

aten = torch.ops.aten

SUMS = ("norm", "kept_norm", "square", "squared_error", "product")


def record_statistics(graph: fx.Graph, key: str) -> None:
    """Add SUMS of every pruned gradient to a graph that went through `prune_input_grads`.

    A graph that nothing is pruned in, and one that records already, are left as they are.

    Args:
        key: Key of the receiver in `kernels.record`. It gets the layers' names as JSON, and their
            sums one layer after the other.
    """
    pruned = graph.find_nodes(op="call_function", target=PRUNE_NM)
    if not pruned or graph.find_nodes(op="call_function", target=RECORD):
        return
    sums = [total for node in pruned for total in _sums(node)]
    layers = json.dumps([_module(node) for node in pruned])
    add_call(RECORD, (sums, key, layers), None, _reader(pruned[-1]))
    graph.lint()


def _module(pruned: fx.Node) -> str:
    """Return the name of the layer whose gradient is pruned, or is a view of what is."""
    while DECISION not in pruned.meta:
        pruned = _reader(pruned)
    return cast(str, pruned.meta[DECISION].module)


def _sums(pruned: fx.Node) -> list[fx.Node]:
    """Compute SUMS, in float32 or float64, ahead of what reads the pruned gradient."""
    source = _reader(pruned)
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


def _reader(pruned: fx.Node) -> fx.Node:
    """Return the first node that reads the pruned gradient."""
    return next(iter(pruned.users))
