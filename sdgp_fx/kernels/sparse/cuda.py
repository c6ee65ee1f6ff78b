"""The sparse product of GPUs, on sparse tensor cores: which layers it covers, and its launches.

Products of matrices have two implementations, the package's own and cuSPARSELt's. The latter is
taken where it was measured to be faster, or where the former does not compile.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import cusparselt, driver, measured
from .binaries import Binary, find, why_no_compiler
from .packed import Packed, can_pack
from .problem import Problem, aligned, empty_result, is_matrix
from .tensor_cores import ARCHITECTURES, IN_CHANNELS, OUT_CHANNELS, Product, tiles


def why_not(problem: Problem) -> str:
    """Return why a problem has no sparse product on its GPU, which has some; "" if it has one.

    Args:
        problem: Of one of `packed.DTYPES`.
    """
    if why := why_not_covered(problem):
        return why
    why = _why_no_kernel(product_of(problem), problem.grad_output.device)
    return why if why and cusparselt.why_not(problem) else ""


def why_no_architecture(device: torch.device) -> str:
    """Return why a GPU has no sparse product at all; "" if it has one."""
    if torch.version.hip or not torch.cuda.is_available():
        return "no sparse product for this device"
    capability = torch.cuda.get_device_capability(device)
    if capability not in ARCHITECTURES:
        return f"no sparse product for compute capability {'.'.join(map(str, capability))}"
    return ""


def why_not_covered(problem: Problem) -> str:
    """Return why a problem has no sparse product on any GPU; "" if it has one."""
    grad_output, weight = problem.grad_output, problem.weight
    if not can_pack(problem.n, problem.m):
        return "keeps more than two of four channels"
    if problem.prune == "rescaled_magnitude" and problem.rescale != "group":
        return "the GPU's sparse product rescales by groups alone"
    if problem.transposed or problem.groups != 1 or grad_output.dim() > 4:
        return "no sparse product of this form on GPUs"
    if any(stride != 1 for stride in problem.stride):
        return "the GPU's sparse product has stride 1 alone"
    sizes = (*weight.shape, *(() if is_matrix(problem) else problem.input_size[2:]))
    if not all(isinstance(size, int) for size in sizes):
        return "sizes not known when compiled"
    if weight.shape[0] % OUT_CHANNELS or weight.shape[1] % IN_CHANNELS:
        return f"C_out is no multiple of {OUT_CHANNELS}, or C_in of {IN_CHANNELS}"
    if any(halo < 0 for halo in halo_of(problem)):
        return "padded by more than the kernel reaches"
    return ""


def halo_of(problem: Problem) -> tuple[int, ...]:
    """Return how many positions of zeros the packed gradient needs on each side."""
    kernel = problem.weight.shape[2:]
    return tuple(
        dilation * (size - 1) - padding
        for size, dilation, padding in zip(kernel, problem.dilation, problem.padding, strict=True)
    )


def product_of(problem: Problem) -> Product:
    """Return what a kernel for a covered problem is compiled for."""
    if is_matrix(problem):
        size, kernel, dilation = [1, 1], [1, 1], [1, 1]
    else:
        size, kernel, dilation = (
            [1] * (4 - problem.grad_output.dim()) + list(values)
            for values in (problem.input_size[2:], problem.weight.shape[2:], problem.dilation)
        )
    return Product(
        dtype=str(problem.grad_output.dtype).removeprefix("torch."),
        height=size[0],
        width=size[1],
        out_channels=int(problem.grad_output.shape[1]),
        in_channels=int(problem.input_size[1]),
        kernel=(kernel[0], kernel[1]),
        dilation=(dilation[0], dilation[1]),
    )


def pruned_input_grad(problem: Problem) -> Tensor:
    """Compute the input gradient.

    Args:
        problem: Covered, with no size of 0. A gradient, or a weight, whose channels are not
            adjacent is copied to channels-last memory first.

    Returns:
        A tensor as from `empty_result`. In contiguous memory it is a copy, of what was computed in
        channels-last memory.
    """
    if _takes_cusparselt(problem):
        return cusparselt.pruned_input_grad(problem)
    result = empty_result(problem)
    multiply(problem, pack(problem), result)
    return result


def _takes_cusparselt(problem: Problem) -> bool:
    if cusparselt.why_not(problem):
        return False
    return not has_kernel(problem) or measured.is_cusparselt_faster(problem)


def has_kernel(problem: Problem) -> bool:
    """Whether a covered problem has a product of the package's own on its GPU."""
    return _find(product_of(problem), problem.grad_output.device) is not None


def pack(problem: Problem) -> Packed:
    """Prune and pack the gradient of a covered problem."""
    # Triton is not there on every platform.
    from .triton_pack import prune_and_pack

    grad_output, _, seed, n, m, prune, *_ = problem
    return prune_and_pack(_channels_last(grad_output), seed, n, m, prune, halo_of(problem))


def multiply(problem: Problem, packed: Packed, result: Tensor) -> None:
    """Write the input gradient of a covered problem, whose gradient is packed, into result."""
    product = product_of(problem)
    out = _channels_last(result)
    launch(binary_of(product, result.device), product, packed, problem.weight, out)
    if out.data_ptr() != result.data_ptr():
        result.copy_(out)


def launch(binary: Binary, product: Product, packed: Packed, weight: Tensor, out: Tensor) -> None:
    """Launch the kernel of a product on out, which is in channels-last memory."""
    weight = aligned(_channels_last(weight))
    tensors = {**packed._asdict(), "weight": weight, "out": out}
    rows = out.numel() // product.in_channels
    tile = binary.kernel.tile
    blocks = product.in_channels // tile.columns * -(-rows // tile.rows)
    batch = rows // (product.height * product.width)
    driver.launch(binary, out.device, blocks, tensors, batch)


def _why_no_kernel(product: Product, device: torch.device) -> str:
    """Return why a product has no kernel on a GPU; "" if it has one. It may compile it."""
    if _find(product, device) is not None:
        return ""
    return why_no_compiler() or "the sparse product does not compile"


def binary_of(product: Product, device: torch.device) -> Binary:
    """Return the kernel that computes a product on a device, which has one."""
    binary = _find(product, device)
    assert binary is not None
    return binary


@functools.cache
def _find(product: Product, device: torch.device) -> Binary | None:
    architecture = ARCHITECTURES[torch.cuda.get_device_capability(device)]
    return find(product, tiles(product, architecture)[0], architecture)


def _channels_last(tensor: Tensor) -> Tensor:
    """Return a tensor (N, C, *positions), with C innermost in memory; a copy if it has to be."""
    if tensor.dim() == 2:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
