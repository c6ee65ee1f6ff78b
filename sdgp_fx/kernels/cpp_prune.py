"""The operator sdgp::prune_nm on CPUs, in C++ that is compiled when it is first needed.

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

from ..config import RESCALE_SCOPES

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("prune.cpp")
PRUNING = Path(__file__).with_name("pruning.h")

DTYPES = (torch.float32, torch.bfloat16)

# The values of the enum Function in C++.
FUNCTIONS = ("random", "magnitude", "rescaled_magnitude", "mvue")

MOST_SPACE_DIMS = 3

Space = ctypes.c_int64 * MOST_SPACE_DIMS


class Gradient(ctypes.Structure):
    """The struct of the same name in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad_output", "result")),
        *((name, ctypes.c_int64) for name in ("is_bfloat16", "threads", "seed", "n", "m")),
        *((name, ctypes.c_int64) for name in ("function", "scope", "samples", "channels")),
        ("output_size", Space),
        ("grad_strides", ctypes.c_int64 * 5),
        ("result_strides", ctypes.c_int64 * 5),
    )


def why_not(dtype: torch.dtype, dims: int, prune: str) -> str:
    """Return why gradients on a CPU are not pruned by this kernel; "" if they are.

    The first call may compile it, which takes seconds.

    Args:
        dims: How many dimensions they have.
        prune: The pruning function.
    """
    if prune not in FUNCTIONS:
        return "no such pruning function in C++"
    if dtype not in DTYPES:
        return "dtype not supported by the C++ kernel"
    if dims > 2 + MOST_SPACE_DIMS:
        return "more than three dimensions of positions"
    return why_not_compiled()


def why_not_compiled() -> str:
    """Return why there is no compiled kernel, compiling it if need be; "" if there is one."""
    return _compiled()[1]


def prepare(
    grad_output: Tensor, n: int, m: int, prune: str, rescale: str
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return a function that prunes gradients of this one's form.

    It does what `reference.prune_nm` does, to the last bit but for wider scopes' sums, and calls no
    other function of Python's.

    Args:
        grad_output: One for which `why_not` has no reason. All strides are read in place.

    Raises:
        ValueError: There is no such pruning function.
    """
    if grad_output.numel() == 0:
        return lambda grad_output, seed: torch.empty_like(grad_output)
    prepared, result = Gradient(), torch.empty_like(grad_output)
    described = grad_output.shape, grad_output.stride(), result.stride(), grad_output.dtype
    describe(prepared, *described, n, m, prune, rescale)
    prune_nm = cast(ctypes.CDLL, _compiled()[0]).sdgp_prune_nm

    def compute(grad_output: Tensor, seed: Tensor | None) -> Tensor:
        result = torch.empty_like(grad_output)
        fields = Gradient.from_buffer_copy(prepared)
        fields.grad_output, fields.result = grad_output.data_ptr(), result.data_ptr()
        fields.threads = torch.get_num_threads()
        fields.seed = 0 if seed is None else int(seed)
        prune_nm(ctypes.byref(fields))
        return result

    return compute


def describe(
    fields: Gradient,
    size: Sequence[int],
    strides: Sequence[int],
    result_strides: Sequence[int],
    dtype: torch.dtype,
    n: int,
    m: int,
    prune: str,
    rescale: str,
) -> None:
    """Set what does not differ from one call to the next.

    Args:
        size, strides: Of the gradient, (N, C, *spatial).
        result_strides: Of the result, whose dimensions are these as well.
        dtype: Of both.
        n, m, prune, rescale: As in `SDGPConfig`.

    Raises:
        ValueError: There is no such pruning function.
    """
    if prune not in FUNCTIONS:
        raise ValueError(f"prune: the kernels in C++ have no pruning function {prune!r}")
    absent = [0] * (2 + MOST_SPACE_DIMS - len(size))
    fields.is_bfloat16 = dtype == torch.bfloat16
    fields.n, fields.m = n, m
    fields.function, fields.scope = FUNCTIONS.index(prune), RESCALE_SCOPES.index(rescale)
    fields.samples, fields.channels = size[:2]
    fields.output_size = space(size[2:], 1)
    fields.grad_strides = (*strides[:2], *absent, *strides[2:])
    fields.result_strides = (*result_strides[:2], *absent, *result_strides[2:])


def space(values: Sequence[int], fill: int) -> ctypes.Array[ctypes.c_int64]:
    """Return values of space with leading ones for the dimensions that are absent."""
    return Space(*[fill] * (MOST_SPACE_DIMS - len(values)), *values)


@functools.cache
def _compiled() -> tuple[ctypes.CDLL | None, str]:
    return load(SOURCE)


def text_of(source: Path) -> str:
    """Return the text of C++ that begins with the pruning functions."""
    return PRUNING.read_text() + source.read_text()


def load(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """Compile C++ that begins with the pruning functions, unless it has been.

    Returns:
        The library, or None, and why there is none.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        return CppCodeCache.load(text_of(source), "cpu"), ""
    except InvalidCxxCompiler:
        return None, "no C++ compiler"
    except (CppCompileError, OSError) as error:
        log.warning("%s does not compile: %s", source.name, error)
        return None, "the C++ compiler fails"
