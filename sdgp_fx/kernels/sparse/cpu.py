"""The sparse product of the CPU, in C++ that is compiled when it is first needed.

It is compiled by what Inductor compiles its own C++ with: for this machine's vectors, with torch's
OpenMP, once for all processes, and kept where Inductor keeps its code.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ...config import RESCALE_SCOPES
from .problem import Problem, empty_result

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("pruned_input_grad.cpp")

DTYPES = (torch.float32, torch.bfloat16)

# The values of the enum Function in C++.
FUNCTIONS = ("random", "magnitude", "rescaled_magnitude", "mvue")

_Space = ctypes.c_int64 * 3


class _Problem(ctypes.Structure):
    """The struct of the same name in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad_output", "weight", "result")),
        *((name, ctypes.c_int64) for name in ("is_bfloat16", "threads", "seed", "n", "m")),
        *((name, ctypes.c_int64) for name in ("function", "scope", "samples", "groups")),
        *((name, ctypes.c_int64) for name in ("out_channels", "in_channels")),
        *((name, _Space) for name in ("output_size", "input_size", "kernel", "stride")),
        *((name, _Space) for name in ("padding", "dilation")),
        ("transposed", ctypes.c_int64),
        ("grad_strides", ctypes.c_int64 * 5),
        ("weight_strides", ctypes.c_int64 * 6),
        ("result_strides", ctypes.c_int64 * 5),
    )


def why_not_compiled() -> str:
    """Return why there is no compiled product, compiling it if need be; "" if there is one."""
    return _compiled()[1]


def prepare(problem: Problem) -> Callable[[Problem], Tensor]:
    """Return a function that computes the input gradients of problems with the same `key_of`.

    In a network of small layers what is done here would take longer than the products.

    Args:
        problem: Checked; of one of DTYPES, with no size of 0. All strides are read in place.

    Returns:
        A function whose result is a tensor as from `empty_result`.

    Raises:
        ValueError: There is no such pruning function.
    """
    result = empty_result(problem)
    size, strides, prepared = result.shape, result.stride(), _describe(problem, result)

    def compute(problem: Problem) -> Tensor:
        grad_output, weight, seed = problem[:3]
        result = grad_output.new_empty_strided(size, strides)
        fields = _Problem.from_buffer_copy(prepared)
        fields.grad_output, fields.weight = grad_output.data_ptr(), weight.data_ptr()
        fields.result = result.data_ptr()
        fields.threads = torch.get_num_threads()
        fields.seed = 0 if seed is None else int(seed)
        library, reference = cast(ctypes.CDLL, _compiled()[0]), ctypes.byref(fields)
        workspace = torch.empty(library.sdgp_workspace_bytes(reference), dtype=torch.uint8)
        library.sdgp_pruned_input_grad(reference, ctypes.c_void_p(workspace.data_ptr()))
        return result

    return compute


def _describe(problem: Problem, result: Tensor) -> _Problem:
    """Describe a problem, without the values that differ from one call to the next."""
    if problem.prune not in FUNCTIONS:
        raise ValueError(f"prune: the sparse product has no pruning function {problem.prune!r}")
    grad_output, weight = problem.grad_output, problem.weight
    groups, absent = problem.groups, 5 - grad_output.dim()

    def space(values: Sequence[int], fill: int) -> ctypes.Array[ctypes.c_int64]:
        return _Space(*[fill] * absent, *values)

    def strides(values: Sequence[int], *counted: int) -> tuple[int, ...]:
        return (*counted, *values[:2], *[0] * absent, *values[2:])

    # Of the weight, in the order (group, output channel, input channel, *kernel).
    to_next, first, second = weight.shape[0] // groups * weight.stride(0), *weight.stride()[:2]
    of_channels = (second, first) if problem.transposed else (first, second)
    weight_strides = strides((*of_channels, *weight.stride()[2:]), to_next)
    return _Problem(
        is_bfloat16=grad_output.dtype == torch.bfloat16,
        n=problem.n,
        m=problem.m,
        function=FUNCTIONS.index(problem.prune),
        scope=RESCALE_SCOPES.index(problem.rescale),
        samples=grad_output.shape[0],
        groups=groups,
        out_channels=grad_output.shape[1] // groups,
        in_channels=result.shape[1] // groups,
        output_size=space(grad_output.shape[2:], 1),
        input_size=space(result.shape[2:], 1),
        kernel=space(weight.shape[2:], 1),
        stride=space(problem.stride, 1),
        padding=space(problem.padding, 0),
        dilation=space(problem.dilation, 1),
        transposed=problem.transposed,
        grad_strides=strides(grad_output.stride()),
        weight_strides=weight_strides,
        result_strides=strides(result.stride()),
    )


@functools.cache
def _compiled() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or why there is none."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        library = CppCodeCache.load(SOURCE.read_text(), "cpu")
    except InvalidCxxCompiler:
        return None, "no C++ compiler"
    except (CppCompileError, OSError) as error:
        log.warning("The sparse product of the CPU does not compile: %s", error)
        return None, "the C++ compiler fails"
    library.sdgp_workspace_bytes.restype = ctypes.c_int64
    return library, ""
