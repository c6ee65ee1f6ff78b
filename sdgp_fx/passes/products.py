"""Multiply pruned elements by a product that skips the zeros.

    before   p  = sdgp.prune_nm(gO, seed, ...)
             gx = convolution_backward(p, x, w, ..., mask=[1, 0, 0])        or mm(p, w)

    after    gx = sdgp.pruned_input_grad(gO, w, seed, ...)

What the input gradient is says `prune_input_grads`; this is how it is computed. The operator
prunes, packs and multiplies block by block, so that p never goes through memory. A layer whose
product stays dense keeps its prune, which on a GPU is fused with what produces gO.

A linear layer is a product of matrices to the operator, too, unless it is rescaled over positions,
with scope "feature_map". Then it is a convolution with a kernel of size 1.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import SDGPConfig
from ..kernels.op import PRUNE_NM
from ..kernels.sparse.op import PRUNED_INPUT_GRAD
from .backward import find_parts
from .graph import compute, sizes_of
from .layers import Layer
from .marks import COMPUTES, DECISION, FACTOR_IN_WEIGHT
from .prune_input_grads import find_layers

aten = torch.ops.aten


def skip_zeros(graph: fx.Graph, config: SDGPConfig) -> None:
    """Rewrite a joint graph that went through `prune_input_grads`, in place, with its branches.

    Layers get the product that their decision names. One whose pruned gradient something else
    reads keeps the dense one, and so does a graph that has been rewritten before.
    """
    for part in find_parts(graph):
        if not _skip_zeros(part.graph, config):
            continue
        part.graph.eliminate_dead_code()
        part.graph.lint()
        if part.graph is not graph and part.graph.owning_module is not None:
            part.graph.owning_module.recompile()


def _skip_zeros(graph: fx.Graph, config: SDGPConfig) -> bool:
    """Rewrite one graph; return whether it has changed."""
    is_any = any(DECISION in n.meta and n.meta[DECISION].product == "sparse" for n in graph.nodes)
    found = [
        (layer, pruned)
        for layer in (find_layers(graph, config) if is_any else ())
        if (pruned := _find_prune(layer)) is not None
    ]
    for layer, pruned in found:
        _replace_product(layer, pruned)
    return bool(found)


def _find_prune(layer: Layer) -> fx.Node | None:
    """Return what prunes a layer that gets the sparse product; None if more than that reads it."""
    node, reader = layer.grad_output, layer.node
    if DECISION not in node.meta or node.meta[DECISION].product != "sparse":
        return None
    while list(node.users) == [reader]:
        if node.target is PRUNE_NM:
            return node
        node, reader = cast(fx.Node, node.args[0]), node
    return None


def _replace_product(layer: Layer, pruned: fx.Node) -> None:
    """Compute the input gradient from the dense gradient that pruned is made of."""
    geometry, weight, source = layer.geometry, layer.weight, layer.node
    assert geometry is not None
    grad_output, seed, n, m, prune, rescale, _ = cast(Any, pruned.args)
    sizes = rows = sizes_of(geometry.input, source)
    positions = grad_output.meta["val"].dim() - len(sizes)
    if positions:
        batch, _, *space = sizes_of(grad_output, source)
        sizes = [batch, rows[1], *space]
        kernel = [*sizes_of(weight, source), *[1] * positions]
        weight = compute(aten.view.default, (weight, kernel), source)
        geometry = geometry.over_positions(positions)
    arguments = (grad_output, weight, seed, n, m, prune, rescale, sizes, *geometry[1:])
    product = input_grad = compute(PRUNED_INPUT_GRAD, arguments, source)
    product.meta[COMPUTES] = layer.grad_output.meta[DECISION]
    if FACTOR_IN_WEIGHT in pruned.meta:
        product.meta[FACTOR_IN_WEIGHT] = pruned.meta[FACTOR_IN_WEIGHT]
    if positions:
        last = [0, *range(2, 2 + positions), 1]
        input_grad = compute(aten.permute.default, (product, last), source)
        if not input_grad.meta["val"].is_contiguous():
            contiguous = {"memory_format": torch.contiguous_format}
            input_grad = compute(aten.clone.default, (input_grad,), source, **contiguous)
        input_grad = compute(aten.view.default, (input_grad, rows), source)
    layer.replace_input_grad(_with_strides_of(layer.input_grad, input_grad, source))


def _with_strides_of(recorded: Tensor, product: fx.Node, source: fx.Node) -> fx.Node:
    """Copy product where the rest of the graph was traced with other strides."""
    strides = product.meta["val"].stride()
    if all(
        size == 1 or statically_known_true(mine == traced)
        for size, mine, traced in zip(recorded.shape, strides, recorded.stride(), strict=True)
    ):
        return product
    outermost_first = sorted(range(recorded.dim()), key=recorded.stride, reverse=True)
    inverse = sorted(range(recorded.dim()), key=outermost_first.__getitem__)
    rows = compute(aten.permute.default, (product, outermost_first), source)
    copy = compute(aten.clone.default, (rows,), source, memory_format=torch.contiguous_format)
    return compute(aten.permute.default, (copy, inverse), source)
