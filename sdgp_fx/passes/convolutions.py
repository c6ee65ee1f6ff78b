"""The convolutions of a joint graph.

    before   gx, gw, gb = convolution_backward(gO, x, w, ..., mask=[1, 1, 1])

    after    gw, gb = convolution_backward(gO, x, w, ..., mask=[0, 1, 1])
             gx     = convolution_backward(p,  x, w, ..., mask=[1, 0, 0])

Libraries run the two halves of convolution_backward one after the other anyway.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..kernels.channels import take_channels
from .graph import add_call, is_channels_last
from .layers import Geometry, Layer
from .marks import DENSE_HALF, is_pruned

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class _Arguments(NamedTuple):
    """Arguments of aten.convolution_backward."""

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


@dataclasses.dataclass(frozen=True, eq=False)
class ConvolutionLayer(Layer):
    """A convolution of any number of dimensions, transposed or not.

    Shapes: `grad_output` (N, C_out, *spatial), `input` (N, C_in, *spatial), `weight`
    (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) if transposed.
    """

    kind = "conv"

    @property
    def _arguments(self) -> _Arguments:
        return _Arguments(*cast(Any, self.node.args))

    @property
    def channel_dim(self) -> int:
        return 1

    @property
    def macs(self) -> Any:
        x, weight, grad_output = (
            node.meta["val"].shape for node in (self.input, self.weight, self.grad_output)
        )
        return convolution_macs(x, weight, grad_output, self.transposed)

    @property
    def macs_per_grad_value(self) -> Any:
        macs = self.weight.meta["val"].numel() // self.channels
        return macs // math.prod(self._arguments.stride) if self.transposed else macs

    @property
    def is_depthwise(self) -> bool:
        return statically_known_true(self.channels == self.groups)

    @property
    def can_scale_outputs(self) -> bool:
        return self.groups == 1 or not self.transposed

    @property
    def dense_half(self) -> fx.Node | None:
        return self.node if DENSE_HALF in self.node.meta else None

    @property
    def input_grad(self) -> Tensor:
        value: Tensor = self.node.meta["val"][0]
        return value

    @property
    def geometry(self) -> Geometry | None:
        _, x, _, _, stride, padding, dilation, transposed, _, groups, _ = self._arguments
        sizes = [list(sizes) for sizes in (stride, padding, dilation)]
        if not all(isinstance(size, int) for size in (*sizes[0], *sizes[1], *sizes[2], groups)):
            return None
        return Geometry(x, *sizes, transposed, groups)

    def replace_operands(self, grad_output: fx.Node, weight: fx.Node) -> None:
        """Split the node: its input gradient becomes a node that reads the operands given."""
        values = self.node.meta["val"]
        mask = [True, False, False]
        operands = self._arguments._replace(
            grad_output=grad_output, weight=weight, output_mask=mask
        )
        half = add_call(CONVOLUTION_BACKWARD, tuple(operands), (values[0], None, None), self.node)
        for input_grad in _input_grads(self.node):
            input_grad.update_arg(0, half)
        self._drop_input_grad()

    def replace_input_grad(self, input_grad: fx.Node) -> None:
        for node in _input_grads(self.node):
            node.replace_all_uses_with(input_grad)
        self._drop_input_grad()

    def _drop_input_grad(self) -> None:
        arguments = self._arguments
        mask = [False, *arguments.output_mask[1:]]
        self.node.args = tuple(arguments._replace(output_mask=mask))
        self.node.meta.update({"val": (None, *self.node.meta["val"][1:]), DENSE_HALF: True})

    def take_outputs(self, weight: Tensor, index: Tensor) -> Tensor:
        if self.can_scale_outputs:
            dim = 1 if self.transposed else 0
            return take_channels(weight, index, dim, is_channels_last(self.weight))
        # (groups, C_in / groups, C_out / groups, *kernel), and C_out as one dimension.
        by_group = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        taken = take_channels(by_group.flatten(0, 1), index, 0, False)
        return taken.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)


def find_convolutions(graph: fx.Graph) -> list[ConvolutionLayer]:
    """Find the convolutions with a gradient.

    Args:
        graph: A joint graph of ATen operators with `meta["val"]`.
    """
    layers = []
    for node in graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD):
        if DENSE_HALF in node.meta:
            continue
        args = _Arguments(*cast(Any, node.args))
        is_half = list(args.output_mask) == [True, False, False]
        layers.append(
            ConvolutionLayer(
                node=node,
                grad_output=args.grad_output,
                weight=args.weight,
                input=args.input,
                groups=args.groups,
                transposed=args.transposed,
                has_input_grad=args.output_mask[0] and bool(_input_grads(node)),
                has_weight_grad=args.output_mask[1],
                is_pruned=is_half and is_pruned(args.grad_output),
            )
        )
    return layers


def convolution_macs(
    input: Sequence[Any], weight: Sequence[Any], output: Sequence[Any], transposed: bool
) -> Any:
    """Count the multiply-adds of a convolution from its shapes, those with padding included."""
    return math.prod(input if transposed else output) * math.prod(weight[1:])


def _input_grads(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
