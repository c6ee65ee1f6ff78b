"""Layers and gradients for the operator sdgp::pruned_input_grad."""

import dataclasses

import torch
from hypothesis import strategies as st

from . import strategies

SEED = torch.tensor([1234567890123456789])


@dataclasses.dataclass
class Case:
    """Arguments of the operator, and the padding of the output of a transposed convolution."""

    grad_output: torch.Tensor
    weight: torch.Tensor
    input_size: tuple
    stride: list
    padding: list
    dilation: list
    transposed: bool = False
    groups: int = 1
    output_padding: list | None = None

    def arguments(self, n=2, m=4, prune="rescaled_magnitude", rescale="group", seed=SEED):
        layer = (self.stride, self.padding, self.dilation, self.transposed, self.groups)
        return self.grad_output, self.weight, seed, n, m, prune, rescale, self.input_size, *layer

    def input_grad(self, grad_output, dtype=torch.float64):
        """Compute the input gradient of any gradient, by autograd of the layer in dtype."""
        x = torch.zeros(self.input_size, dtype=dtype, requires_grad=True)
        y = forward(self, x, self.weight.to(dtype))
        return torch.autograd.grad(y, x, grad_output.to(dtype))[0]

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def forward(case, x, weight):
    if not case.stride:
        return x @ (weight if case.transposed else weight.T)
    settings = (case.stride, case.padding, case.dilation, case.transposed)
    extra = case.output_padding or [0] * len(case.stride)
    return torch.ops.aten.convolution(x, weight, None, *settings, extra, case.groups)


def make_case(
    in_channels,
    out_channels,
    kernel,
    size,
    *,
    batch=2,
    stride=1,
    padding=0,
    dilation=1,
    transposed=False,
    groups=1,
    output_padding=0,
    dtype=torch.float32,
):
    """Make a case with random numbers and a contiguous gradient.

    Args:
        kernel, size: A number for each dimension; none for a product of matrices.
        stride, padding, dilation, output_padding: A number, or one for each dimension.
    """

    def each(value):
        return [value] * len(size) if isinstance(value, int) else list(value)

    pair = (in_channels, out_channels) if transposed else (out_channels, in_channels)
    weight = torch.randn(pair[0], pair[1] // groups, *kernel).to(dtype)
    input_size = (batch, in_channels, *size)
    space = (each(stride), each(padding), each(dilation))
    case = Case(weight, weight, input_size, *space, transposed, groups, each(output_padding))
    output = forward(case, torch.empty(input_size, device="meta"), weight.to("meta"))
    return case.replace(grad_output=torch.randn(output.shape).to(dtype))


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@st.composite
def cases(draw, m, dtype, kind):
    """Draw a layer of any kind and its gradient, in any layout."""
    dims = draw(st.integers(0, 3))
    groups = draw(st.integers(1, 3)) if dims else 1
    transposed = draw(st.booleans())
    stride, padding, dilation, kernel, size, extra = [], [], [], [], [], []
    for _ in range(dims):
        stride.append(draw(st.integers(1, 3)))
        padding.append(draw(st.integers(0, 2)))
        dilation.append(draw(st.integers(1, 2)))
        kernel.append(draw(st.integers(1, 3 if dims == 3 else 4)))
        reach = dilation[-1] * (kernel[-1] - 1) + 1
        if transposed:
            extra.append(draw(st.integers(0, max(stride[-1], dilation[-1]) - 1)))
            shortest = 1 + max(0, -((reach + extra[-1] - 2 * padding[-1] - 1) // stride[-1]))
        else:
            extra.append(0)
            shortest = max(1, reach - 2 * padding[-1])
        size.append(shortest + draw(st.integers(0, 4 if dims == 3 else 8)))
    case = make_case(
        groups * draw(st.sampled_from([1, 3, 8, 17, 40])),
        groups * m * draw(st.integers(1, max(1, 96 // m if dims < 2 else 48 // m))),
        kernel,
        size,
        batch=draw(st.integers(1, 3)),
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=transposed,
        groups=groups,
        output_padding=extra,
        dtype=dtype,
    )
    grad_output = strategies.values(case.grad_output.shape, dtype, kind, draw(strategies.seeds))
    weight = case.weight
    if draw(st.booleans()):
        weight = channels_last(weight)
    if draw(st.booleans()):
        return case.replace(grad_output=channels_last(grad_output), weight=weight)
    return case.replace(grad_output=draw(strategies.layouts(grad_output)), weight=weight)
