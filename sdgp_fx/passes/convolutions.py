"""The convolutions of a joint graph.

    before   gx, gw, gb = convolution_backward(gO, x, w, ..., mask=[1, 1, 1])

    after    gw, gb = convolution_backward(gO, x, w, ..., mask=[0, 1, 1])
             gx     = convolution_backward(p,  x, w, ..., mask=[1, 0, 0])

Libraries run the two halves of convolution_backward one after the other anyway.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from .graph import add_call
from .layers import Layer, is_pruned

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default

# Device types where the dense half comes ahead of the prune, whose lowering for C++ waits for it.
# That for a GPU has to be the gradient's first reader.
DENSE_HALF_FIRST = ("cpu",)

# In a node's meta: it keeps the dense gradient of a layer, whose input gradient is another node.
_DENSE_HALF = "sdgp_dense_half"


class _Arguments(NamedTuple):
    """Of aten.convolution_backward."""

    grad_output: fx.Node
    input: fx.Node
    weight: fx.Node
    bias_sizes: Any
    stride: Any
    padding: Any
    dilation: Any
    transposed: bool
    output_padding: Any
    groups: int
    output_mask: Sequence[bool]  # input, weight, bias


def find_convolutions(graph: fx.Graph) -> list[Layer]:
    """All convolution_backward nodes of a joint graph of ATen operators with `meta["val"]`."""
    layers = []
    for node in graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD):
        if _DENSE_HALF in node.meta:
            continue
        args = _Arguments(*cast(Any, node.args))
        is_half = list(args.output_mask) == [True, False, False]
        layers.append(
            Layer(
                kind="conv",
                node=node,
                grad_output=args.grad_output,
                weight=args.weight,
                groups=args.groups,
                transposed=args.transposed,
                input=args.input,
                uses=_uses(args),
                has_input_grad=args.output_mask[0] and bool(_input_grads(node)),
                has_weight_grad=args.output_mask[1],
                is_pruned=is_pruned(args.grad_output) and is_half,
                feed=functools.partial(_split, node, args),
            )
        )
    return layers


def _split(node: fx.Node, args: _Arguments, grad_output: fx.Node, weight: fx.Node) -> None:
    """Compute the input gradient apart, from other operands; the rest stays as it was."""
    values = node.meta["val"]
    mask = [True, False, False]
    operands = args._replace(grad_output=grad_output, weight=weight, output_mask=mask)
    half = add_call(CONVOLUTION_BACKWARD, tuple(operands), (values[0], None, None), node)
    for input_grad in _input_grads(node):
        input_grad.update_arg(0, half)
    node.args = tuple(args._replace(output_mask=[False, *args.output_mask[1:]]))
    node.meta.update({"val": (None, *values[1:]), _DENSE_HALF: True})
    if values[0].device.type in DENSE_HALF_FIRST:
        grad_output.prepend(node)


def _uses(args: _Arguments) -> Any:
    uses = args.weight.meta["val"].numel() // args.grad_output.meta["val"].shape[1]
    return uses // math.prod(args.stride) if args.transposed else uses


def _input_grads(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
