"""The operator sdgp::pruned_input_grad: prune an output gradient, and multiply what is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import cpu
from .problem import Problem, check, check_sizes, empty_result


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
def pruned_input_grad(*arguments: Any) -> Tensor:
    """Compute the input gradient of a convolution from its output gradient, pruned n:m.

    Args:
        arguments: Those of `Problem`.

    Returns:
        What aten.convolution_backward gives for `sdgp::prune_nm` of grad_output, up to rounding.
        Its strides are those of channels-last memory if the channels of grad_output are adjacent,
        and of contiguous memory otherwise.

    Raises:
        ValueError: An argument is not as described there and in `SDGPConfig`.
    """
    return _dense(Problem(*arguments))


PRUNED_INPUT_GRAD = torch.ops.sdgp.pruned_input_grad.default


@pruned_input_grad.register_kernel("cpu")
def _(*arguments: Any) -> Tensor:
    problem = Problem(*arguments)
    grad_output, weight = problem.grad_output, problem.weight
    if why_not_sparse(grad_output.dtype, grad_output.device, weight.dtype):
        return _dense(problem)
    check(problem)
    check_sizes(problem)
    result = empty_result(problem)
    if 0 in (grad_output.numel(), weight.numel(), result.numel()):
        return result.zero_()
    cpu.pruned_input_grad(problem, result)
    return result


@pruned_input_grad.register_fake
def _(*arguments: Any) -> Tensor:
    problem = Problem(*arguments)
    check(problem)
    return empty_result(problem)


def _dense(problem: Problem) -> Tensor:
    """Compute the operator by the reference and a dense product, on any device."""
    check(problem)
    output_padding = check_sizes(problem)
    grad_output, weight, seed, n, m, prune, rescale, input_size, *layer = problem
    pruned = reference.prune_nm(grad_output, seed, n, m, prune, rescale)
    result = empty_result(problem)
    if grad_output.dim() == 2:
        pruned, weight, input_size = pruned[..., None], weight[..., None], (*input_size, 1)
        layer[:3], output_padding = [[1], [0], [1]], [0]
    *geometry, groups = layer
    input_grad, _, _ = torch.ops.aten.convolution_backward(
        pruned,
        pruned.new_empty(1).expand(tuple(input_size)),
        weight,
        None,
        *geometry,
        output_padding,
        groups,
        [True, False, False],
    )
    return result.copy_(input_grad.view_as(result))
