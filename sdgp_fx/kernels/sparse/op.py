"""The operator sdgp::pruned_input_grad: prune an output gradient, and multiply what is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import cpu, cuda
from .problem import Problem, check, check_sizes, empty_result


def why_not_sparse(problem: Problem) -> str:
    """Return why a pruned gradient is multiplied densely; "" if its zeros are skipped.

    Args:
        problem: Of tensors that may be fake.
    """
    grad_output, weight = problem.grad_output, problem.weight
    if why := why_no_product(grad_output.dtype, grad_output.device):
        return why
    if weight.dtype != grad_output.dtype:
        return "the weight's dtype is not the gradient's"
    return cuda.why_not(problem) if grad_output.device.type == "cuda" else ""


def why_no_product(dtype: torch.dtype, device: torch.device) -> str:
    """Return why a device has no sparse product for gradients of a dtype; "" if it has one.

    The first call for a CPU may compile it, which takes seconds.
    """
    skip_zeros = {"cpu": cpu, "cuda": cuda}.get(device.type)
    if skip_zeros is None:
        return "no sparse product for this device"
    if dtype not in skip_zeros.DTYPES:
        return "dtype not supported by the sparse product"
    return cuda.why_no_architecture(device) if skip_zeros is cuda else cpu.why_not_compiled()


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


@pruned_input_grad.register_kernel(("cpu", "cuda"))
def _(*arguments: Any) -> Tensor:
    problem = Problem(*arguments)
    check(problem)
    if why_not_sparse(problem):
        return _dense(problem)
    check_sizes(problem)
    result = empty_result(problem)
    if 0 in (problem.grad_output.numel(), problem.weight.numel(), result.numel()):
        return result.zero_()
    skip_zeros = cuda if result.is_cuda else cpu
    skip_zeros.pruned_input_grad(problem, result)
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
