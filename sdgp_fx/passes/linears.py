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
the weight. Those of a transform of torch.func have not, but are known as its own; nor have those of
a torch.autograd.Function, which Dynamo has traced one by one. Attention multiplies matrices too:
which product is a linear layer says the function that Dynamo traced it from.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..kernels.channels import take_channels
from ..kernels.sparse.op import PRUNED_INPUT_GRAD
from .backward import backward_nodes, is_taken_inside, source_of
from .graph import compute
from .layers import Geometry, Layer, plain_sizes
from .marks import VIEWS, is_pruned, source_of_layout

aten = torch.ops.aten
MM = aten.mm.default
ADDMM = aten.addmm.default
BMM = aten.bmm.default
_PRODUCTS = (MM, ADDMM, BMM, aten.baddbmm.default)

# Dynamo notes in a node's meta the function that it comes from, or the module of torch.nn that
# calls it, but not for a subclass of that.
_FUNCTIONS = (
    nn.functional.linear,
    torch._C._nn.linear,
    nn.functional.multi_head_attention_forward,
)
_MODULES = (nn.Linear, nn.MultiheadAttention)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearLayer(Layer):
    """A linear layer: one product of matrices, or a batch of products with one weight.

    Shapes: `grad_output` (rows, C_out), `input` (rows, C_in), `weight` (C_out, C_in), or
    (C_in, C_out) if transposed; all three with a batch dimension ahead for a batched product.
    """

    kind = "linear"

    @property
    def _is_batched(self) -> bool:
        return self.node.target is BMM

    @property
    def channel_dim(self) -> int:
        return 2 if self._is_batched else 1

    @property
    def macs(self) -> Any:
        return linear_macs(self.input.meta["val"].shape, self.grad_output.meta["val"].shape)

    @property
    def macs_per_grad_value(self) -> Any:
        return self.weight.meta["val"].shape[0 if self.transposed else -1]

    @property
    def position_dims(self) -> int:
        return max(_returned(self.grad_output).meta["val"].dim(), 2) - 2

    @property
    def weight_shape(self) -> tuple[Any, ...]:
        return super().weight_shape[-2:]

    @property
    def parameter_shape(self) -> tuple[Any, ...]:
        return self.channels, self.input.meta["val"].shape[-1]

    @property
    def can_scale_outputs(self) -> bool:
        return not self._is_batched

    @property
    def geometry(self) -> Geometry | None:
        if self._is_batched or self.transposed:
            return None
        return Geometry(self.input, [], [], [], False, 1)

    def replace_operands(self, grad_output: fx.Node, weight: fx.Node) -> None:
        if self.transposed:
            rows_second = compute(aten.permute.default, (grad_output, [1, 0]), self.node)
            self.node.args = (weight, rows_second)
        else:
            self.node.args = (grad_output, weight)

    def replace_input_grad(self, input_grad: fx.Node) -> None:
        self.node.replace_all_uses_with(input_grad)

    def take_outputs(self, weight: Tensor, index: Tensor) -> Tensor:
        if self._is_batched:
            taken = take_channels(weight[0], index, 0, False)
            return taken.expand(len(weight), -1, -1)
        return take_channels(weight, index, 1 if self.transposed else 0, False)

    def channels_second(self) -> fx.Node:
        returned = _returned(self.grad_output)
        dims = returned.meta["val"].dim()
        if dims < 3:
            return self.grad_output
        order = [0, dims - 1, *range(1, dims - 1)]
        return compute(aten.permute.default, (returned, order), self.node)

    def as_grad_output(self, gradient: fx.Node) -> fx.Node:
        dims, form = gradient.meta["val"].dim(), self.grad_output
        result = compute(aten.permute.default, (gradient, [0, *range(2, dims), 1]), self.node)
        if form is _returned(form):
            return result
        if not result.meta["val"].is_contiguous():
            contiguous = {"memory_format": torch.contiguous_format}
            result = compute(aten.clone.default, (result,), self.node, **contiguous)
        return compute(aten.view.default, (result, form.args[1]), self.node)


def linear_macs(input: Sequence[Any], output: Sequence[Any]) -> Any:
    """Count the multiply-adds of a linear layer from the shapes (..., C_in) and (..., C_out)."""
    return math.prod(input) * output[-1]


def find_linears(graph: fx.Graph) -> list[LinearLayer]:
    """Find the linear layers with a gradient.

    Args:
        graph: A joint graph of ATen operators with `meta["val"]`.
    """
    backward = backward_nodes(graph)
    forwards: list[fx.Node] = []
    owners: dict[Any, fx.Node] = {}
    gradients: dict[Any, list[fx.Node]] = defaultdict(list)
    others: list[fx.Node] = []
    for node in graph.nodes:
        number = node.meta.get("seq_nr")
        if node.target not in _PRODUCTS:
            continue
        if node in backward or is_taken_inside(node):
            is_numbered = node in backward and source_of(node) is None
            if node.target in (MM, BMM):
                (gradients[number] if is_numbered else others).append(node)
        else:
            forwards.append(node)
            # What runs under no_grad later on has the number that autograd gave last.
            owners.setdefault(number, node)
    layers: dict[fx.Node, LinearLayer] = {}
    for forward in forwards:
        number = forward.meta.get("seq_nr")
        weight, _ = _untransposed(cast(fx.Node, forward.args[-1]))
        if not _is_linear(forward) or weight.meta["val"].dim() != 2:
            continue
        own = gradients[number] if number is None or owners[number] is forward else []
        for products in (own, others):
            found = [_with_input_grad(node, forward, products) for node in products]
            if not any(found):
                found = [_with_weight_grad(node, forward) for node in products]
            layers |= {layer.node: layer for layer in found if layer is not None}
    return list(layers.values())


def _returned(grad_output: fx.Node) -> fx.Node:
    """Return the gradient of the layer's output, where grad_output is a view of it."""
    if grad_output.target not in VIEWS:
        return grad_output
    source = cast(fx.Node, grad_output.args[0])
    shape, features = source.meta["val"].shape, grad_output.meta["val"].shape[-1]
    is_whole = len(shape) > 2 and statically_known_true(shape[-1] == features)
    return source if is_whole else grad_output


def _is_linear(forward: fx.Node) -> bool:
    source = source_of(forward)
    is_module = isinstance(source, type) and issubclass(source, _MODULES)
    return is_module or source in _FUNCTIONS


def _with_input_grad(
    node: fx.Node, forward: fx.Node, products: Iterable[fx.Node]
) -> LinearLayer | None:
    """Return the layer whose input gradient node computes; None if it computes something else.

    Args:
        forward: The layer's product, with the weight as (in_features, out_features).
        products: Nodes among which the weight gradient is, if there is one.
    """
    left, right = cast(tuple[fx.Node, fx.Node], node.args)
    x = cast(fx.Node, forward.args[-2])
    if _is_weight(right, forward, is_pruned(left), as_factor=False):
        grad_output, weight = left, right
    elif (
        node.target is MM
        and _transposes(right)
        and _is_weight(left, forward, is_pruned(right), as_factor=True)
    ):
        grad_output, weight = cast(fx.Node, right.args[0]), left
    else:
        return None
    return LinearLayer(
        node=node,
        grad_output=grad_output,
        weight=weight,
        input=x,
        groups=1,
        transposed=weight is left,
        has_input_grad=bool(node.users),
        has_weight_grad=any(_multiplies(product, grad_output, x) for product in products),
    )


def _is_weight(operand: fx.Node, forward: fx.Node, is_pruned: bool, as_factor: bool) -> bool:
    """Whether operand is what the input gradient of a layer reads of its weight.

    Args:
        forward: The layer's product.
        is_pruned: Whether the gradient that operand is multiplied with is pruned.
        as_factor: Whether the weight lies as in forward, (in_features, out_features).
    """
    x, factor = cast(tuple[fx.Node, fx.Node], forward.args[-2:])
    base, odd = _untransposed(factor)
    if is_pruned:  # It may be scaled, or fewer channels.
        return base in _sources(operand)
    found, is_odd = _untransposed(operand)
    if found is not base or (is_odd == odd) != as_factor:
        return False
    if _untransposed(x)[0] is not base:
        return True
    # The weight gradient of linear(z, z) multiplies by z, too, but by x as forward read it.
    return operand is factor if as_factor else _transposes(operand) and operand.args[0] is factor


def _sources(node: fx.Node) -> set[fx.Node]:
    """Return node, what it is computed from by its first argument, and so on."""
    sources: set[fx.Node] = set()
    while isinstance(node, fx.Node):
        sources.add(node)
        node = cast(fx.Node, next(iter(node.args), None))
    return sources


def _with_weight_grad(node: fx.Node, forward: fx.Node) -> LinearLayer | None:
    """Return the layer whose weight gradient node computes, for a layer without an input gradient.

    Args:
        forward: The layer's product, with the weight as (in_features, out_features).
    """
    x, weight = cast(tuple[fx.Node, fx.Node], forward.args[-2:])
    base = _untransposed(x)[0]
    others = [operand for operand, _ in map(_untransposed, cast(Any, node.args[-2:]))]
    sizes = (plain_sizes(matrix.meta["val"].shape[-2:]) for matrix in (node, weight))
    if (
        base not in others
        or base is _untransposed(weight)[0]
        or len(set(map(frozenset, sizes))) > 1
    ):
        return None
    others.remove(base)
    # Its input gradient is computed already, by another product.
    read = [n.args[0] for n in node.graph.find_nodes(op="call_function", target=PRUNED_INPUT_GRAD)]
    if source_of_layout(others[0]) in map(source_of_layout, cast(list[fx.Node], read)):
        return None
    return LinearLayer(
        node=node,
        grad_output=others[0],
        weight=weight,
        input=x,
        groups=1,
        transposed=True,
        has_input_grad=False,
        has_weight_grad=True,
    )


def _multiplies(node: fx.Node, *operands: fx.Node) -> bool:
    """Whether node multiplies these matrices, or their transposes."""
    multiplied = {_untransposed(operand)[0] for operand in cast(Any, node.args)}
    return multiplied == {_untransposed(operand)[0] for operand in operands}


def _untransposed(matrix: fx.Node) -> tuple[fx.Node, bool]:
    """Return what matrix is a view of, without a batch, and whether matrix is its transpose.

    The conjugate of a complex matrix, which its gradients read, counts as a view.
    """
    odd = False
    while True:
        if _transposes(matrix):
            matrix, odd = cast(fx.Node, matrix.args[0]), not odd
        elif _repeats_matrix(matrix) or matrix.target is aten._conj.default:
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
    expanded = cast(fx.Node, node.args[0]) if node.target in VIEWS else node
    if expanded.target is not aten.expand.default:
        return False
    return bool(cast(fx.Node, expanded.args[0]).meta["val"].dim() == 2)
