"""The operator sdgp::pruned_input_grad: prune an output gradient, and multiply what is kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..op import MOST_PREPARED
from . import cpu, cuda, packed
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

# What computes a problem, by all of it but its tensors' values and addresses, as in ..op.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_prepared: dict[Hashable, Product] = {}


def pruned_input_grad(
    grad_output: Tensor, weight: Tensor, seed: Tensor | None, *settings: Any
) -> Tensor:
    """Compute the input gradient of a convolution from its output gradient, pruned n:m.

    Args:
        grad_output, weight, seed, settings: Those of `Problem`.

    Returns:
        What aten.convolution_backward gives for `sdgp::prune_nm` of grad_output, up to rounding.
        Its strides are those of channels-last memory if the channels of grad_output are adjacent,
        and of contiguous memory otherwise.

    Raises:
        ValueError: An argument is not as described there and in `SDGPConfig`.
        RuntimeError: A derivative of the operator would be needed, which it hasn't.
    """
    if torch.is_grad_enabled() and (grad_output.requires_grad or weight.requires_grad):
        raise RuntimeError("sdgp::pruned_input_grad has no derivative")
    # As few functions of Python's as in prune_nm.
    key = (
        *(grad_output.shape, grad_output.stride(), grad_output.dtype, grad_output.device),
        *(weight.shape, weight.stride(), weight.dtype, weight.device),
        None if seed is None else (seed.shape, seed.dtype),
        *settings[:4],
        *map(tuple, settings[4:8]),
        *settings[8:],
    )
    compute = _prepared.get(key)
    if compute is None:
        compute = _prepare(Problem(grad_output, weight, seed, *settings))
        if len(_prepared) >= MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = compute
    return compute(grad_output, weight, seed)


def _prepare(problem: Problem) -> Product:
    """Check a problem; return a function of its tensors that computes it."""
    check(problem)
    compute: Callable[[Problem], Tensor]
    if why_not_sparse(problem):
        compute = _dense
    else:
        check_sizes(problem)
        if 0 in (*problem.grad_output.shape, *problem.weight.shape, *problem.input_size):
            compute = _zeros
        elif problem.grad_output.is_cpu:
            return cpu.prepare(problem)
        else:
            compute = cuda.pruned_input_grad
    settings = problem[3:]  # Without the tensors, which would never be freed.

    def of_tensors(grad_output: Tensor, weight: Tensor, seed: Tensor | None) -> Tensor:
        return compute(Problem(grad_output, weight, seed, *settings))

    return of_tensors


_LIBRARY.impl("pruned_input_grad", pruned_input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("sdgp::pruned_input_grad", lib=_LIBRARY)
def _(*arguments: Any) -> Tensor:
    problem = Problem(*arguments)
    check(problem)
    return empty_result(problem)


def _zeros(problem: Problem) -> Tensor:
    return empty_result(problem).zero_()


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
