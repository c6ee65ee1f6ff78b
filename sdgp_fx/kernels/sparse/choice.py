"""Choose between the dense and the sparse product on a GPU: measured once, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import cuda, cusparselt, measured
from .measured import CUSPARSELT, DENSE, SPARSE
from .op import PRUNED_INPUT_GRAD, dense_input_grad
from .problem import Problem

NOT_FASTER = "measured to be faster"
DETERMINISTIC = "deterministic algorithms are on, so nothing is measured"
CAPTURED = "a CUDA graph is being captured, so nothing is measured"
NOT_STATIC = "sizes not known when compiled, so nothing is measured"

# Milliseconds of each product, after as many to warm up.
TIME_MS = 50


def why_not_chosen(problem: Problem) -> str:
    """Return why the dense product is taken for what a GPU's sparse one covers; "" if it isn't.

    The first call for a problem times them on the problem's device.

    Args:
        problem: Of tensors that may be fake.
    """
    grad_output = problem.grad_output
    if torch.are_deterministic_algorithms_enabled():
        return DETERMINISTIC
    if not all(isinstance(size, int) for size in (*grad_output.shape, *problem.input_size)):
        return NOT_STATIC
    times = measured.load(problem)
    # TileLang may have been installed since.
    if times is None or (SPARSE not in times and cuda.has_kernel(problem)):
        if torch.cuda.is_current_stream_capturing():
            return CAPTURED
        times = measure(problem)
        measured.save(problem, times)
    return NOT_FASTER if times[DENSE] == min(times.values()) else ""


def measure(problem: Problem) -> dict[str, float]:
    """Time the products of a problem, on noise; return the medians in milliseconds, by name.

    Prune and packing are part of the sparse ones. The dense one gets the gradient as it is, since
    its prune is fused with what computes the gradient.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from triton.testing import do_bench

    with unset_fake_temporarily(), torch.no_grad():
        times = {}
        for name, product in products_of(_with_noise(problem)).items():
            try:
                times[name] = do_bench(product, TIME_MS, TIME_MS, return_mode="median")
            except RuntimeError:
                # A form that the library refuses.
                if name != CUSPARSELT:
                    raise
        return times


def products_of(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Return functions that compute the input gradient, by name; DENSE does not prune.

    SPARSE is the package's own, for a problem that was not measured.
    """
    grad_output, weight, *_ = problem
    is_linear = grad_output.dim() == 2
    dense = (
        partial(torch.mm, grad_output, weight) if is_linear else partial(dense_input_grad, problem)
    )
    products: dict[str, Callable[[], Tensor]] = {DENSE: dense}
    if not grad_output.is_cuda or cuda.has_kernel(problem):
        products[SPARSE] = partial(PRUNED_INPUT_GRAD, *problem)
    if grad_output.is_cuda and not cusparselt.why_not(problem):
        products[CUSPARSELT] = partial(cusparselt.pruned_input_grad, problem)
    return products


def _with_noise(problem: Problem) -> Problem:
    """Return the problem with real tensors on its device, of the same order of strides.

    Expanded ones get memory of their own.
    """
    grad_output, weight = (
        torch.empty_strided(
            t.shape, torch.empty_like(t).stride(), dtype=t.dtype, device=t.device
        ).normal_()
        for t in (problem.grad_output, problem.weight)
    )
    seed = torch.zeros(1, dtype=torch.int64, device=grad_output.device)
    return problem._replace(grad_output=grad_output, weight=weight, seed=seed)
