"""The linear layers of a joint graph: `torch.nn.Linear` and `torch.nn.functional.linear`.

AOTAutograd leaves of a layer, between reshapes:

    forward    y  = addmm(b, x, t(w))            or mm(x, t(w))
    backward   gx = mm(gO, t(t(w)))              or t(mm(t(w), t(gO))), if x is column-major
               gw = t(mm(t(gO), x))

    after      gx = mm(p, t(t(w)))               or t(mm(t(w), t(p)))

Where w is frozen and the rows of x are no view of it, they are batched products, with w expanded:

    forward    y  = bmm(x, expand(t(w)))
    backward   gx = bmm(gO, transpose(expand(t(w))))

    after      gx = bmm(p, transpose(expand(t(w))))

The products of the backward have the sequence number of the forward's, and gx is the one with
the weight. Where a transform of torch.func makes the gradient part of the forward they have not,
but are known as its own. Attention multiplies matrices too: which product is a linear layer says
the function that Dynamo traced it from.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import fx, nn
from torch._functorch import eager_transforms
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import compute
from .layers import Layer, is_pruned

aten = torch.ops.aten
MM = aten.mm.default
BMM = aten.bmm.default

_VIEWS = (aten.view.default, aten._unsafe_view.default)

# Dynamo (checked on torch 2.11, 2.14 and 2.15) notes in a node's meta the function that it comes
# from, or the module of torch.nn that calls it; for the gradients of torch.func.grad, the
# transforms' private one.
_FUNCTIONS = (nn.functional.linear, torch._C._nn.linear)
_MODULES = (nn.Linear, nn.MultiheadAttention)


def find_linears(graph: fx.Graph) -> list[Layer]:
    """All linear layers with a gradient in a joint graph of ATen operators with `meta["val"]`.

    The grad_output of a layer has shape (rows, out_features), of a batched product
    (batch, rows, out_features).
    """
    products = defaultdict(list)
    of_transforms = []
    for target in (MM, BMM):
        for node in graph.find_nodes(op="call_function", target=target):
            products[node.meta.get("seq_nr")].append(node)
            if _source(node) is eager_transforms._autograd_grad:
                of_transforms.append(node)
    layers: dict[fx.Node, Layer] = {}
    for target in (MM, aten.addmm.default, BMM):
        for forward in graph.find_nodes(op="call_function", target=target):
            weight = cast(fx.Node, forward.args[-1])
            if not _is_linear(forward) or _untransposed(weight)[0].meta["val"].dim() != 2:
                continue
            # Of the backward: layers before the first that has one may share a sequence number.
            related = [n for n in products[forward.meta.get("seq_nr")] if not _is_linear(n)]
            candidates = (*related, *of_transforms)
            found = {node: _input_grad(node, forward, candidates) for node in candidates}
            input_grads = {node: layer for node, layer in found.items() if layer is not None}
            layers |= input_grads or {node: _without_input_grad(node, forward) for node in related}
    return list(layers.values())


def is_batched(layer: Layer) -> bool:
    return layer.node.target is BMM


def features_second(layer: Layer) -> fx.Node | None:
    """The grad_output of a layer as a view of shape (N, out_features, *positions).

    N and positions are those of what the layer returns in the model. None if it has no positions.
    """
    returned = _returned(layer.grad_output)
    dims = returned.meta["val"].dim()
    if dims < 3:
        return None
    order = [0, dims - 1, *range(1, dims - 1)]
    return compute(aten.permute.default, (returned, order), layer.node)


def features_last(gradient: fx.Node, layer: Layer) -> fx.Node:
    """A gradient of shape (N, out_features, *positions) in the form of the layer's grad_output."""
    dims, form = gradient.meta["val"].dim(), layer.grad_output
    result = compute(aten.permute.default, (gradient, [0, *range(2, dims), 1]), layer.node)
    if form is _returned(form):
        return result
    if not result.meta["val"].is_contiguous():
        memory_format = torch.contiguous_format
        result = compute(aten.clone.default, (result,), layer.node, memory_format=memory_format)
    return compute(aten.view.default, (result, form.args[1]), layer.node)


def _returned(grad_output: fx.Node) -> fx.Node:
    """The gradient of what the layer returns, if grad_output is a view of that; else itself."""
    if grad_output.target not in _VIEWS:
        return grad_output
    source = cast(fx.Node, grad_output.args[0])
    shape, features = source.meta["val"].shape, grad_output.meta["val"].shape[-1]
    is_whole = len(shape) > 2 and statically_known_true(shape[-1] == features)
    return source if is_whole else grad_output


def _is_linear(forward: fx.Node) -> bool:
    source = _source(forward)
    is_module = isinstance(source, type) and issubclass(source, _MODULES)
    return is_module or source in _FUNCTIONS


def _source(forward: fx.Node) -> Any:
    """The function that Dynamo traced a node of the forward from."""
    stack = forward.meta.get("source_fn_stack")
    return stack[-1][1] if stack else None


def _input_grad(node: fx.Node, forward: fx.Node, products: Iterable[fx.Node]) -> Layer | None:
    """The layer whose input gradient node computes; None if it computes something else.

    forward: the layer's product, with the weight as (in_features, out_features).
    products: among which the weight gradient is, if there is one.
    """
    left, right = cast(tuple[fx.Node, fx.Node], node.args)
    x, transposed_weight = cast(tuple[fx.Node, fx.Node], forward.args[-2:])
    (base, odd), (base_left, odd_left), (base_right, odd_right) = map(
        _untransposed, (transposed_weight, left, right)
    )
    # A weight that took factors is another node than the forward's.
    if _is_pruned_view(left) or (base_right is base and odd_right != odd):
        grad_output, weight, feed = left, right, _feed
    elif (
        node.target is MM
        and _transposes(right)
        and (_is_pruned_view(right) or (base_left is base and odd_left == odd))
    ):
        grad_output, weight, feed = cast(fx.Node, right.args[0]), left, _feed_transposed
    else:
        return None
    return Layer(
        kind="linear",
        node=node,
        grad_output=grad_output,
        weight=weight,
        groups=1,
        transposed=weight is left,
        input=x,
        uses=weight.meta["val"].shape[0 if weight is left else -1],
        has_input_grad=bool(node.users),
        has_weight_grad=any(_multiplies(product, grad_output, x) for product in products),
        is_pruned=_is_pruned_view(grad_output),
        feed=functools.partial(feed, node),
    )


def _without_input_grad(node: fx.Node, forward: fx.Node) -> Layer:
    """node: computes the weight gradient."""
    return Layer(
        kind="linear",
        node=node,
        grad_output=forward,  # The layer's output is of the same form.
        weight=cast(fx.Node, forward.args[-1]),
        groups=1,
        transposed=True,
        input=cast(fx.Node, forward.args[-2]),
        uses=0,
        has_input_grad=False,
        has_weight_grad=True,
        is_pruned=False,
        feed=functools.partial(_feed, node),
    )


def _multiplies(product: fx.Node, *operands: fx.Node) -> bool:
    """Whether product is that of these matrices, or of their transposes."""
    multiplied = {_untransposed(operand)[0] for operand in cast(Any, product.args)}
    return multiplied == {_untransposed(operand)[0] for operand in operands}


def _feed(node: fx.Node, grad_output: fx.Node, weight: fx.Node) -> None:
    node.args = (grad_output, weight)


def _feed_transposed(node: fx.Node, grad_output: fx.Node, weight: fx.Node) -> None:
    node.args = (weight, compute(aten.permute.default, (grad_output, [1, 0]), node))


def _untransposed(matrix: fx.Node) -> tuple[fx.Node, bool]:
    """What matrix is a view of, and whether it is the transpose; the batch it may have left out."""
    odd = False
    while True:
        if _transposes(matrix):
            matrix, odd = cast(fx.Node, matrix.args[0]), not odd
        elif _repeats_matrix(matrix):
            matrix = cast(fx.Node, matrix.args[0])
        else:
            return matrix, odd


def _transposes(node: fx.Node) -> bool:
    """Whether node is the transpose of a matrix, or of each matrix of a batch."""
    if node.target is aten.permute.default:
        return list(cast(Any, node.args[1])) in ([1, 0], [0, 2, 1])
    if node.target is aten.transpose.int:
        dims = node.meta["val"].dim()
        swapped = {dim % dims for dim in cast(Any, node.args[1:])}
        return swapped == {dims - 2, dims - 1}
    return node.target is aten.t.default and node.meta["val"].dim() == 2


def _repeats_matrix(node: fx.Node) -> bool:
    """Whether node is one matrix for all of a batch, or a view of that."""
    expanded = cast(fx.Node, node.args[0]) if node.target in _VIEWS else node
    if expanded.target is not aten.expand.default:
        return False
    return bool(cast(fx.Node, expanded.args[0]).meta["val"].dim() == 2)


def _is_pruned_view(grad_output: fx.Node) -> bool:
    while grad_output.target in (*_VIEWS, aten.permute.default, aten.clone.default):
        if is_pruned(grad_output):
            return True
        grad_output = cast(fx.Node, grad_output.args[0])
    return is_pruned(grad_output)
