"""The sparse product of the CPU, in C++ that is compiled when it is first needed.

It is compiled by what Inductor compiles its own C++ with: for this machine's vectors, with torch's
OpenMP, once for all processes, and kept where Inductor keeps its code.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .. import cpp_prune
from ..cpp_prune import DTYPES as DTYPES
from .problem import Problem, empty_result

SOURCE = Path(__file__).with_name("pruned_input_grad.cpp")

# The most memory that a thread keeps for its next call.
KEPT_BYTES = 1 << 25

_of_thread = threading.local()


class _Problem(cpp_prune.Gradient):
    """The struct Problem in C++, field by field."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("groups", "out_channels", "in_channels")),
        *((name, cpp_prune.Space) for name in ("input_size", "kernel", "stride")),
        *((name, cpp_prune.Space) for name in ("padding", "dilation")),
        ("transposed", ctypes.c_int64),
        ("weight_strides", ctypes.c_int64 * 6),
    )


def why_not_compiled() -> str:
    """Return why there is no compiled product, compiling it if need be; "" if there is one."""
    return _compiled()[1]


def prepare(problem: Problem) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return a function that computes problems of this one's form from their tensors.

    In a network of small layers what is done here would take longer than the products. The function
    calls hardly any other of Python's, for the reason given in ..op.

    Args:
        problem: Checked; of one of DTYPES, with no size of 0. All strides are read in place.

    Returns:
        A function whose result is a tensor as from `empty_result`.

    Raises:
        ValueError: There is no such pruning function.
    """
    result = empty_result(problem)
    size, strides, prepared = result.shape, result.stride(), _describe(problem, result)

    library = cast(ctypes.CDLL, _compiled()[0])
    workspace_bytes = library.sdgp_workspace_bytes
    pruned_input_grad = library.sdgp_pruned_input_grad

    def compute(grad_output: Tensor, weight: Tensor, seed: Tensor | None) -> Tensor:
        result = grad_output.new_empty_strided(size, strides)
        fields = _Problem.from_buffer_copy(prepared)
        fields.grad_output, fields.weight = grad_output.data_ptr(), weight.data_ptr()
        fields.result = result.data_ptr()
        fields.threads = torch.get_num_threads()
        fields.seed = 0 if seed is None else int(seed)
        reference = ctypes.byref(fields)
        workspace = _workspace(workspace_bytes(reference))
        pruned_input_grad(reference, ctypes.c_void_p(workspace.data_ptr()))
        return result

    return compute


def _workspace(size: int) -> Tensor:
    """Return memory that no other thread uses: what the last call had, if it is enough.

    Memory that is freed may go back to the system, which clears every page of the next call's. That
    took as long as the product of some layers.
    """
    workspace: Tensor | None = getattr(_of_thread, "workspace", None)
    if workspace is None or workspace.nbytes < size:
        workspace = torch.empty(size, dtype=torch.uint8)
        if size <= KEPT_BYTES:
            _of_thread.workspace = workspace
    return workspace


def _describe(problem: Problem, result: Tensor) -> _Problem:
    """Describe a problem, without the values that differ from one call to the next."""
    grad_output, weight, groups = problem.grad_output, problem.weight, problem.groups
    # Of the weight, in the order (group, output channel, input channel, *kernel).
    to_next, first, second = weight.shape[0] // groups * weight.stride(0), *weight.stride()[:2]
    of_channels = (second, first) if problem.transposed else (first, second)
    absent = [0] * (5 - grad_output.dim())
    fields = _Problem(
        groups=groups,
        out_channels=grad_output.shape[1] // groups,
        in_channels=result.shape[1] // groups,
        input_size=cpp_prune.space(result.shape[2:], 1),
        kernel=cpp_prune.space(weight.shape[2:], 1),
        stride=cpp_prune.space(problem.stride, 1),
        padding=cpp_prune.space(problem.padding, 0),
        dilation=cpp_prune.space(problem.dilation, 1),
        transposed=problem.transposed,
        weight_strides=(to_next, *of_channels, *absent, *weight.stride()[2:]),
    )
    cpp_prune.describe(
        fields,
        grad_output.shape,
        grad_output.stride(),
        result.stride(),
        grad_output.dtype,
        *(problem.n, problem.m, problem.prune, problem.rescale),
    )
    return fields


@functools.cache
def _compiled() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or why there is none."""
    library, why = cpp_prune.load(SOURCE)
    if library is not None:
        library.sdgp_workspace_bytes.restype = ctypes.c_int64
    return library, why
