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
from .graph import add_call, is_channels_last, value_of
from .layers import Geometry, Layer
from .marks import DENSE_HALF

aten = torch.ops.aten
CONVOLUTION_BACKWARD = aten.convolution_backward.default
_EMPTY = (aten.new_empty.default, aten.empty.memory_format)


class _Arguments(NamedTuple):
    """Arguments of aten.convolution_backward; symbolic numbers are nodes."""

    grad_output: fx.Node
    input: fx.Node
    weight: fx.Node
    bias_sizes: Any
    stride: Any
    padding: Any
    dilation: Any
    transposed: bool
    output_padding: Any
    groups: Any
    output_mask: Sequence[bool]  # input, weight, bias


@dataclasses.dataclass(frozen=True, eq=False)
class ConvolutionLayer(Layer):
    """A convolution of any number of dimensions, transposed or not.

    Shapes: `grad_output` (N, C_out, *spatial), `input` (N, C_in, *spatial), `weight`
    (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) if transposed.

    Attributes:
        weight_grad: The node that computes the weight gradient where it is another than `node`,
            as in the backward of a torch.autograd.Function.
    """

    kind = "conv"

    weight_grad: fx.Node | None = None

    @property
    def pruned(self) -> fx.Node | None:
        is_half = list(self._arguments.output_mask) == [True, False, False]
        return super().pruned if is_half else None

    @property
    def dtype(self) -> torch.dtype:
        return torch.complex64 if _is_part_of_complex(self.weight) else super().dtype

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
        return macs // math.prod(value_of(self._arguments.stride)) if self.transposed else macs

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
        if not all(isinstance(size, int) for size in (*stride, *padding, *dilation, groups)):
            return None
        return Geometry(x, list(stride), list(padding), list(dilation), transposed, groups)

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
        if self.weight_grad is not None:
            self.weight_grad.meta[DENSE_HALF] = True

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
    nodes = graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    layers: dict[fx.Node, ConvolutionLayer] = {}
    for node in nodes:
        args = _Arguments(*cast(Any, node.args))
        layers[node] = ConvolutionLayer(
            node=node,
            grad_output=args.grad_output,
            weight=args.weight,
            input=args.input,
            groups=value_of(args.groups),
            transposed=args.transposed,
            has_input_grad=args.output_mask[0] and bool(_input_grads(node)),
            has_weight_grad=args.output_mask[1],
        )
    for layer in list(layers.values()):
        other = next((half for half in layers.values() if _are_halves(layer, half)), None)
        if other is not None:
            layers[layer.node] = dataclasses.replace(
                layer, has_weight_grad=True, weight_grad=other.node
            )
            del layers[other.node]
    return [layer for layer in layers.values() if DENSE_HALF not in layer.node.meta]


def convolution_macs(
    input: Sequence[Any], weight: Sequence[Any], output: Sequence[Any], transposed: bool
) -> Any:
    """Count the multiply-adds of a convolution from its shapes, those with padding included."""
    return math.prod(input if transposed else output) * math.prod(weight[1:])


def _input_grads(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]


def _are_halves(layer: ConvolutionLayer, other: ConvolutionLayer) -> bool:
    """Whether two nodes compute the input gradient and the weight gradient of one layer.

    `torch.nn.grad` does it in halves: the operand that a half does not read is an empty tensor.
    """
    one, two = layer._arguments, other._arguments
    if list(one.output_mask) != [True, False, False] or list(two.output_mask[:2]) != [False, True]:
        return False
    if one.grad_output is not two.grad_output or one[4:10] != two[4:10]:
        return False
    return (one.weight is two.weight or _is_empty(two.weight, one.weight)) and (
        one.input is two.input or _is_empty(one.input, two.input)
    )


def _is_empty(node: fx.Node, like: fx.Node) -> bool:
    """Whether node is a tensor without values of the shape of like."""
    if node.target is not aten.expand.default or (node.meta["val"].shape != like.meta["val"].shape):
        return False
    return cast(fx.Node, node.args[0]).target in _EMPTY


def _is_part_of_complex(weight: fx.Node) -> bool:
    """Whether weight is a part of a complex one, whose convolution is three of real parts."""
    pending = [weight]
    while pending:
        node = pending.pop()
        if node.target is aten.view_as_real.default:
            return True
        if node.target in (aten.select.int, aten.add.Tensor):
            pending += node.all_input_nodes
    return False
