"""The operator sdgp::pruned_input_grad: prune an output gradient, and multiply what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..op import check_arguments
from . import cpu


class Convolution(NamedTuple):
    """What the operator is told of a layer besides its tensors."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    groups: int


def why_not_sparse(
    dtype: torch.dtype, device: torch.device, weight_dtype: torch.dtype | None = None
) -> str:
    """Return why a layer's pruned gradient is multiplied densely here; "" if its zeros are skipped.

    The first call on a CPU may compile the product, which takes seconds.

    Args:
        dtype: Of the gradient.
        weight_dtype: Of the weight; by default that of the gradient.
    """
    if device.type != "cpu":
        return "no sparse product for this device"
    if dtype not in cpu.DTYPES:
        return "dtype not supported by the sparse product"
    if weight_dtype not in (None, dtype):
        return "the weight's dtype is not the gradient's"
    return cpu.why_not_compiled()


@torch.library.custom_op(
    "sdgp::pruned_input_grad",
    mutates_args=(),
    schema=(
        "(Tensor grad_output, Tensor weight, Tensor? seed, int n, int m, str prune, str rescale, "
        "SymInt[] input_size, int[] stride, int[] padding, int[] dilation, bool transposed, "
        "int groups) -> Tensor"
    ),
)
def pruned_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> Tensor:
    """Compute the input gradient of a convolution from its output gradient, pruned n:m.

    A linear layer is a convolution without positions, or with a kernel of size 1.

    Args:
        grad_output: (N, C_out, *positions), with up to three dimensions of positions.
        weight: (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if transposed.
        seed, n, m, prune, rescale: As for sdgp::prune_nm.
        input_size: (N, C_in, *positions), of the result.
        stride, padding, dilation, transposed, groups: As for a convolution, one number for each
            dimension of positions.

    Returns:
        What aten.convolution_backward gives for `sdgp::prune_nm` of grad_output, up to rounding.
        Its strides are those of channels-last memory if the channels of grad_output are adjacent,
        and of contiguous memory otherwise.

    Raises:
        ValueError: An argument is not as described here and in `SDGPConfig`.
    """
    layer = Convolution(stride, padding, dilation, transposed, groups)
    return _dense(grad_output, weight, seed, n, m, prune, rescale, input_size, layer)


PRUNED_INPUT_GRAD = torch.ops.sdgp.pruned_input_grad.default


@pruned_input_grad.register_kernel("cpu")
def _(
    grad_output: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    input_size: Sequence[int],
    *geometry: Any,
) -> Tensor:
    layer = Convolution(*geometry)
    if why_not_sparse(grad_output.dtype, grad_output.device, weight.dtype):
        return _dense(grad_output, weight, seed, n, m, prune, rescale, input_size, layer)
    _check(grad_output, weight, seed, n, m, prune, rescale, input_size, layer)
    _check_sizes(grad_output, weight, input_size, layer)
    result = _empty_result(grad_output, input_size)
    if 0 in (grad_output.numel(), weight.numel(), result.numel()):
        return result.zero_()
    cpu.pruned_input_grad(grad_output, weight, seed, n, m, prune, rescale, result, *layer)
    return result


@pruned_input_grad.register_fake
def _(
    grad_output: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    input_size: Sequence[int],
    *geometry: Any,
) -> Tensor:
    layer = Convolution(*geometry)
    _check(grad_output, weight, seed, n, m, prune, rescale, input_size, layer)
    return _empty_result(grad_output, input_size)


def _dense(
    grad_output: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    input_size: Sequence[int],
    layer: Convolution,
) -> Tensor:
    """Compute the operator by the reference and a dense product, on any device."""
    _check(grad_output, weight, seed, n, m, prune, rescale, input_size, layer)
    output_padding = _check_sizes(grad_output, weight, input_size, layer)
    pruned = reference.prune_nm(grad_output, seed, n, m, prune, rescale)
    result = _empty_result(grad_output, input_size)
    if grad_output.dim() == 2:
        pruned, weight, input_size = pruned[..., None], weight[..., None], (*input_size, 1)
        layer, output_padding = Convolution([1], [0], [1], *layer[-2:]), [0]
    input_grad, _, _ = torch.ops.aten.convolution_backward(
        pruned,
        pruned.new_empty(1).expand(tuple(input_size)),
        weight,
        None,
        *layer[:-1],
        output_padding,
        layer.groups,
        [True, False, False],
    )
    return result.copy_(input_grad.view_as(result))


def _empty_result(grad_output: Tensor, input_size: Sequence[int]) -> Tensor:
    batch, channels, *positions = input_size
    if positions and grad_output.stride(1) == 1:
        return grad_output.new_empty((batch, *positions, channels)).movedim(-1, 1)
    return grad_output.new_empty((batch, channels, *positions))


def _check(
    grad_output: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    input_size: Sequence[int],
    layer: Convolution,
) -> None:
    check_arguments(grad_output, seed, n, m, prune, rescale, layer.groups)
    dims = grad_output.dim()
    if dims > 5:
        raise ValueError(
            f"grad_output: expected (N, C_out) and at most three dimensions more, got {dims - 2}"
        )
    for name, value, count in (
        ("weight", weight.shape, dims),
        ("input_size", input_size, dims),
        *((name, getattr(layer, name), dims - 2) for name in ("stride", "padding", "dilation")),
    ):
        if len(value) != count:
            raise ValueError(
                f"{name}: expected {count} sizes for a gradient of {dims} dimensions, "
                f"got {tuple(value)}"
            )
    channels, per_group = weight.shape[:2]
    sides = (channels, per_group * layer.groups)
    out_channels, in_channels = reversed(sides) if layer.transposed else sides
    if out_channels != grad_output.shape[1] or in_channels != input_size[1]:
        raise ValueError(
            f"weight: expected one from {input_size[1]} to {grad_output.shape[1]} channels in "
            f"{layer.groups} groups, got {tuple(weight.shape)}, transposed={layer.transposed}"
        )
    if channels % layer.groups:
        raise ValueError(
            f"groups: expected a divisor of the weight's {channels} channels, got {layer.groups}"
        )


def _check_sizes(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], layer: Convolution
) -> list[int]:
    """Check that sizes belong together; return the output padding."""
    output_padding = []
    fits = grad_output.shape[0] == input_size[0]
    for i, (stride, padding, dilation) in enumerate(
        zip(layer.stride, layer.padding, layer.dilation, strict=True), start=2
    ):
        if stride < 1 or padding < 0 or dilation < 1:
            fits = False
            break
        reach = dilation * (weight.shape[i] - 1) + 1 - 2 * padding
        size, result = grad_output.shape[i], input_size[i]
        if layer.transposed:
            output_padding.append(size - (result - 1) * stride - reach)
            fits &= 0 <= output_padding[-1] < max(stride, dilation)
        else:
            output_padding.append(0)
            fits &= size == (result - reach) // stride + 1
    if not fits:
        raise ValueError(
            f"input_size: expected one that gives {tuple(grad_output.shape)}, "
            f"got {tuple(input_size)} for {layer} and a weight {tuple(weight.shape)}"
        )
    return output_padding
