"""What every kind of layer can do, as it stands in a joint graph."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from .marks import find_pruned


class Geometry(NamedTuple):
    """What a layer computes, as a convolution: a linear layer is one without positions.

    Attributes:
        input: Input of the forward, (N, C_in, *spatial) or (rows, C_in).
        stride, padding, dilation: An int for each spatial dimension.
    """

    input: fx.Node
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    groups: int

    def over_positions(self, dims: int) -> Geometry:
        """Return the geometry of a linear layer over positions of so many dimensions."""
        return self._replace(stride=[1] * dims, padding=[0] * dims, dilation=[1] * dims)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer(abc.ABC):
    """The product that computes a layer's input gradient, and what it reads.

    A kind of layer is a subclass in a module of its own, with a function that finds its layers in
    a joint graph.

    Attributes:
        kind: Its name in `sdgp.targets`.
        node: The backward node that stands for the layer and carries its module's name: it
            computes the input gradient or, where there is none, the weight gradient.
        grad_output: Gradient of the layer's output; output channels are dimension `channel_dim`.
        weight: The weight as the product reads it: output channels are dimension 0, or
            dimension 1 if `transposed`.
        input: Input of the forward.
        groups: Groups of channels that the layer convolves separately, an int or symbolic.
        has_input_grad: Whether the input gradient is computed and used.
        has_weight_grad: Whether the weight gradient is computed.
    """

    kind: ClassVar[str]

    node: fx.Node
    grad_output: fx.Node
    weight: fx.Node
    input: fx.Node
    groups: Any
    transposed: bool
    has_input_grad: bool
    has_weight_grad: bool

    @property
    @abc.abstractmethod
    def channel_dim(self) -> int:
        """Dimension of the output channels in `grad_output`."""

    @property
    @abc.abstractmethod
    def macs(self) -> Any:
        """Multiply-adds of the forward, an int or symbolic; each gradient takes as many.

        Multiplications by the zeros of a padding count.
        """

    @property
    @abc.abstractmethod
    def macs_per_grad_value(self) -> Any:
        """Multiply-adds of the input gradient per value of `grad_output`, an int or symbolic."""

    @abc.abstractmethod
    def replace_operands(self, grad_output: fx.Node, weight: fx.Node) -> None:
        """Compute the input gradient from other operands; leave everything else as it is."""

    @abc.abstractmethod
    def replace_input_grad(self, input_grad: fx.Node) -> None:
        """Give another node to everything that reads the input gradient."""

    @abc.abstractmethod
    def take_outputs(self, weight: Tensor, index: Tensor) -> Tensor:
        """Select output channels of the weight.

        Args:
            weight: The value of `weight`.
            index: int64 (kept,), output channels, equally many of each group.
        """

    @property
    def pruned(self) -> fx.Node | None:
        """What an earlier run of the pass has pruned, if `grad_output` is that; else None."""
        return find_pruned(self.grad_output)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the forward."""
        dtype: torch.dtype = self.grad_output.meta["val"].dtype
        return dtype

    @property
    def input_grad(self) -> Tensor:
        """The input gradient, as a fake tensor."""
        value: Tensor = self.node.meta["val"]
        return value

    @property
    def geometry(self) -> Geometry | None:
        """The layer as a convolution; None where the input gradient is not of one."""
        return None

    @property
    def channels(self) -> Any:
        """C_out, an int or symbolic."""
        return self.grad_output.meta["val"].shape[self.channel_dim]

    @property
    def position_dims(self) -> int:
        """How many dimensions of positions `channels_second` has."""
        return self.grad_output.meta["val"].dim() - 2

    @property
    def weight_shape(self) -> tuple[Any, ...]:
        """Shape of the weight as the product reads it."""
        return tuple(self.weight.meta["val"].shape)

    @property
    def parameter_shape(self) -> tuple[Any, ...]:
        """Shape of the weight as its module holds it."""
        return self.weight_shape

    @property
    def is_depthwise(self) -> bool:
        """Whether each group has a single output channel."""
        return False

    @property
    def can_scale_outputs(self) -> bool:
        """Whether output channels are one dimension of `weight`, to be scaled by a vector."""
        return True

    @property
    def dense_half(self) -> fx.Node | None:
        """The node that `replace_operands` has left with the dense gradient, if it split one."""
        return None

    def channels_second(self) -> fx.Node:
        """Return `grad_output` as (N, C_out, *positions), N and positions those of the output."""
        return self.grad_output

    def as_grad_output(self, gradient: fx.Node) -> fx.Node:
        """Return a gradient shaped as `channels_second` in the layout of `grad_output`."""
        return gradient


def plain_sizes(shape: Iterable[Any]) -> tuple[int | str, ...]:
    """Return a shape for people and JSON: a symbolic size is its symbol's name."""
    return tuple(size if isinstance(size, int) else str(size) for size in shape)
