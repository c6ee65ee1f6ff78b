"""The operator sdgp::pruned_input_grad: prune an output gradient, and multiply what is kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import cpu, cuda, packed
from .problem import Problem, check, check_sizes, empty_result, key_of


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
    dtypes = {"cpu": cpu.DTYPES, "cuda": packed.DTYPES}.get(device.type)
    if dtypes is None:
        return "no sparse product for this device"
    if dtype not in dtypes:
        return "dtype not supported by the sparse product"
    return cuda.why_no_architecture(device) if device.type == "cuda" else cpu.why_not_compiled()


_SCHEMA = (
    "(Tensor grad_output, Tensor weight, Tensor? seed, int n, int m, str prune, str rescale, "
    "SymInt[] input_size, int[] stride, int[] padding, int[] dilation, bool transposed, "
    "int groups) -> Tensor"
)

# Not a `custom_op`, whose layers of Python would take as long as the product of a small layer.
_LIBRARY = torch.library.Library("sdgp", "FRAGMENT")
_LIBRARY.define("pruned_input_grad" + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))

PRUNED_INPUT_GRAD = torch.ops.sdgp.pruned_input_grad.default

# What computes a problem, by `key_of`: checking and preparing it once serves all steps. Where sizes
# differ from step to step there is no end of them.
_prepared: dict[Hashable, Callable[[Problem], Tensor]] = {}
MOST_PREPARED = 10_000


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
        RuntimeError: A derivative of the operator would be needed, which it hasn't.
    """
    problem = Problem(*arguments)
    tensors = problem.grad_output, problem.weight
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("sdgp::pruned_input_grad has no derivative")
    key = key_of(problem)
    compute = _prepared.get(key)
    if compute is None:
        if len(_prepared) >= MOST_PREPARED:
            _prepared.clear()
        compute = _prepared[key] = _prepare(problem)
    return compute(problem)


def _prepare(problem: Problem) -> Callable[[Problem], Tensor]:
    """Check a problem; return a function that computes it, and others with its `key_of`."""
    check(problem)
    if why_not_sparse(problem):
        return _dense
    check_sizes(problem)
    if 0 in (*problem.grad_output.shape, *problem.weight.shape, *problem.input_size):
        return lambda problem: empty_result(problem).zero_()
    if problem.grad_output.is_cuda:
        return cuda.pruned_input_grad
    return cpu.prepare(problem)


_LIBRARY.impl("pruned_input_grad", pruned_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("sdgp::pruned_input_grad", lib=_LIBRARY)
def _(*arguments: Any) -> Tensor:
    problem = Problem(*arguments)
    check(problem)
    return empty_result(problem)


def _dense(problem: Problem) -> Tensor:
    """Compute the operator by the reference and a dense product, on any device."""
    grad_output, _, seed, n, m, prune, rescale, *_ = problem
    pruned = reference.prune_nm(grad_output, seed, n, m, prune, rescale)
    result = empty_result(problem)
    input_grad = dense_input_grad(problem._replace(grad_output=pruned))
    return result.copy_(input_grad.view_as(result))


def dense_input_grad(problem: Problem) -> Tensor:
    """Compute the input gradient by the library, of the gradient as it is: nothing is pruned."""
    output_padding = check_sizes(problem)
    grad_output, weight, *_, input_size, stride, padding, dilation, transposed, groups = problem
    geometry = [stride, padding, dilation]
    if grad_output.dim() == 2:
        grad_output, weight = grad_output[..., None], weight[..., None]
        input_size, geometry, output_padding = (*input_size, 1), [[1], [0], [1]], [0]
    input_grad: Tensor = torch.ops.aten.convolution_backward(
        grad_output,
        grad_output.new_empty(1).expand(tuple(input_size)),
        weight,
        None,
        *geometry,
        transposed,
        output_padding,
        groups,
        [True, False, False],
    )[0]
    return input_grad
