"""cuSPARSELt's product of matrices, for linear layers and 1x1 convolutions.

Unlike the package's own it reads a pruned gradient from memory, and compresses that first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..op import PRUNE_NM
from .problem import Problem, aligned, empty_result, is_matrix

# The gradient's rows come in multiples of this. Its columns, and the weight's, would have to be
# multiples of 16 and 8, which what sparse tensor cores cover is anyway.
ROWS = 16


def why_not(problem: Problem) -> str:
    """Return why cuSPARSELt has no product for what sparse tensor cores cover; "" if it has one.

    Args:
        problem: Of tensors that may be fake.
    """
    if not torch.backends.cusparselt.is_available():
        return "torch was built without cuSPARSELt"
    if not is_matrix(problem):
        return "cuSPARSELt multiplies matrices alone"
    batch, _, *positions = problem.grad_output.shape
    rows = math.prod(positions, start=batch)
    if not isinstance(rows, int):
        return "sizes not known when compiled"
    return "" if rows and rows % ROWS == 0 else f"rows are no multiple of {ROWS}"


def pruned_input_grad(problem: Problem) -> Tensor:
    """Compute the input gradient of a covered problem; return a tensor as from `empty_result`."""
    grad_output, weight, seed, n, m, prune, rescale, *_ = problem
    pruned = PRUNE_NM(grad_output, seed, n, m, prune, rescale, 1).movedim(1, -1)
    weight = aligned(weight.flatten(1).contiguous())
    # It goes by sizes and addresses alone: of what is not contiguous it would read other values.
    compressed = torch._cslt_compress(pruned.reshape(-1, pruned.shape[-1]).contiguous())
    rows = torch._cslt_sparse_mm(compressed, weight)
    input_grad = rows.view(*pruned.shape[:-1], -1).movedim(-1, 1)
    if grad_output.dim() == 2 or grad_output.stride(1) == 1:
        return input_grad
    return empty_result(problem).copy_(input_grad)
