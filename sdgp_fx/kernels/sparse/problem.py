"""What the operator sdgp::pruned_input_grad is given, and what must hold of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..op import check_arguments

MOST_POSITION_DIMS = 3


class Problem(NamedTuple):
    """Compute the input gradient of a convolution from its output gradient, pruned n:m.

    A linear layer is a convolution without positions, or with a kernel of size 1.

    Attributes:
        grad_output: (N, C_out, *positions), with up to three dimensions of positions.
        weight: (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if transposed.
        seed, n, m, prune, rescale: As for sdgp::prune_nm.
        input_size: (N, C_in, *positions), of the result.
        stride, padding, dilation, transposed, groups: As for a convolution, one number for each
            dimension of positions.
    """

    grad_output: Tensor
    weight: Tensor
    seed: Tensor | None
    n: int
    m: int
    prune: str
    rescale: str
    input_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    groups: int


def is_matrix(problem: Problem) -> bool:
    """Whether the positions are rows like any others: a kernel of size 1 without padding."""
    return all(size == 1 for size in problem.weight.shape[2:]) and not any(problem.padding)


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory begins at a multiple of 16 bytes; a copy if it has to be."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def empty_result(problem: Problem) -> Tensor:
    """Return a tensor for the result: channels-last if the channels of grad_output are adjacent."""
    grad_output = problem.grad_output
    batch, channels, *positions = problem.input_size
    if positions and grad_output.stride(1) == 1:
        return grad_output.new_empty((batch, *positions, channels)).movedim(-1, 1)
    return grad_output.new_empty((batch, channels, *positions))


def check(problem: Problem) -> None:
    """Check all but sizes of positions.

    Raises:
        ValueError: An argument is not as described here and in `SDGPConfig`.
    """
    grad_output, weight, input_size = problem.grad_output, problem.weight, problem.input_size
    check_arguments(
        grad_output,
        problem.seed,
        problem.n,
        problem.m,
        problem.prune,
        problem.rescale,
        problem.groups,
    )
    dims = grad_output.dim()
    if dims > 2 + MOST_POSITION_DIMS:
        raise ValueError(
            f"grad_output: expected (N, C_out) and at most three dimensions more, got {dims - 2}"
        )
    for name, value, count in (
        ("weight", weight.shape, dims),
        ("input_size", input_size, dims),
        *((name, getattr(problem, name), dims - 2) for name in ("stride", "padding", "dilation")),
    ):
        if len(value) != count:
            raise ValueError(
                f"{name}: expected {count} sizes for a gradient of {dims} dimensions, "
                f"got {tuple(value)}"
            )
    channels, per_group = weight.shape[:2]
    sides = (channels, per_group * problem.groups)
    out_channels, in_channels = reversed(sides) if problem.transposed else sides
    if out_channels != grad_output.shape[1] or in_channels != input_size[1]:
        raise ValueError(
            f"weight: expected one from {input_size[1]} to {grad_output.shape[1]} channels in "
            f"{problem.groups} groups, got {tuple(weight.shape)}, transposed={problem.transposed}"
        )
    if channels % problem.groups:
        raise ValueError(
            f"groups: expected a divisor of the weight's {channels} channels, got {problem.groups}"
        )


def check_sizes(problem: Problem) -> list[int]:
    """Check that sizes belong together; return the output padding.

    Raises:
        ValueError: They do not.
    """
    grad_output, weight, input_size = problem.grad_output, problem.weight, problem.input_size
    output_padding = []
    fits = grad_output.shape[0] == input_size[0]
    for i, (stride, padding, dilation) in enumerate(
        zip(problem.stride, problem.padding, problem.dilation, strict=True), start=2
    ):
        if stride < 1 or padding < 0 or dilation < 1:
            fits = False
            break
        reach = dilation * (weight.shape[i] - 1) + 1 - 2 * padding
        size, result = grad_output.shape[i], input_size[i]
        if problem.transposed:
            output_padding.append(size - (result - 1) * stride - reach)
            fits &= 0 <= output_padding[-1] < max(stride, dilation)
        else:
            output_padding.append(0)
            fits &= size == (result - reach) // stride + 1
    if not fits:
        raise ValueError(
            f"input_size: expected one that gives {tuple(grad_output.shape)}, "
            f"got {tuple(input_size)} for stride={problem.stride}, padding={problem.padding}, "
            f"dilation={problem.dilation}, transposed={problem.transposed} and a weight "
            f"{tuple(weight.shape)}"
        )
    return output_padding
