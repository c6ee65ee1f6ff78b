"""The reference: every pruning function in eager PyTorch, which all other kernels must agree with.

The channels of a gradient (N, C, *spatial) are taken in groups of m neighbours, one group for
every sample and position; all of the work is done on the view (N, *spatial, C / m, m).
Sums over a group run from the lowest channel up, in float32 (float64 for float64 gradients),
so that a kernel that adds in the same order makes the same choices to the last bit.
"""

from __future__ import annotations

import functools
import itertools
import operator
from typing import NamedTuple

import torch
from torch import Tensor

# Uniform numbers are multiples of 2**-24: exact in float32, and below 1.
UNIFORM_BITS = 24


class Tolerance(NamedTuple):
    """How far another kernel's values may be from those of the reference.

    It must keep the same values, and those that are kept unscaled must agree to the last bit.
    Scaled values may differ:

    Attributes:
        rtol: By one unit in the last place of the dtype. By several of float32, as sums over the
            wider scopes run in another order, and a GPU divides to two units.
        atol: By one unit of the subnormal numbers, which doesn't shrink with them.
        group_rtol: As `rtol`, where no sum runs over more than one group.
    """

    rtol: float
    atol: float
    group_rtol: float


TOLERANCES = {
    torch.float32: Tolerance(rtol=2e-6, atol=1e-44, group_rtol=1e-6),
    torch.bfloat16: Tolerance(rtol=2**-7, atol=1e-40, group_rtol=2**-7),
    torch.float16: Tolerance(rtol=2**-10, atol=6e-8, group_rtol=2**-10),
}


def prune_nm(
    grad_output: Tensor, seed: Tensor | None, n: int, m: int, prune: str, rescale: str
) -> Tensor:
    """Keep n of every m consecutive channels of grad_output, and set the others to zero.

    Args:
        grad_output: (N, C, *spatial) with C a multiple of m, floating point, any strides.
        seed: One int64, for "random" and "mvue"; the other functions don't read it.
        prune: The pruning function.
        rescale: The scope of "rescaled_magnitude"; the other functions don't read it.

    Returns:
        A new tensor with the shape and dtype of grad_output, and the strides of
        `torch.empty_like(grad_output)`.

    Raises:
        ValueError: There is no such pruning function, or it needs a seed and there is none.
    """
    groups = channel_groups(grad_output, m)
    values = groups.to(accumulation_dtype(groups.dtype))
    if prune == "magnitude":
        result = torch.where(magnitude_keep(groups, n), groups, 0)
    elif prune == "rescaled_magnitude":
        result = rescaled_magnitude(values, n, rescale)
    elif prune == "random":
        result = torch.where(random_keep(groups.shape, _required(seed, prune), n), groups, 0)
    elif prune == "mvue":
        result = mvue(values, uniform(values.shape[:-1], _required(seed, prune)), n)
    else:
        raise ValueError(f"prune: the reference has no pruning function {prune!r}")
    pruned = saturated(result, groups).flatten(-2).movedim(-1, 1)
    return torch.empty_like(grad_output).copy_(pruned)


def channel_factor(grad_output: Tensor, n: int, m: int) -> Tensor:
    """Compute the factors (C,) of "rescaled_magnitude" with scope "channel".

    Args:
        grad_output: As for `prune_nm`.

    Returns:
        Factors in the dtype of sums: `accumulation_dtype` of that of grad_output.
    """
    values = channel_groups(grad_output, m).to(accumulation_dtype(grad_output.dtype))
    return rescale_factor(values, magnitude_keep(values, n), "channel").flatten()


def channel_groups(grad_output: Tensor, m: int) -> Tensor:
    """Return grad_output as the view (N, *spatial, C / m, m)."""
    return grad_output.movedim(1, -1).unflatten(-1, (grad_output.shape[1] // m, m))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of this dtype are summed and scaled."""
    return torch.promote_types(dtype, torch.float32)


def saturated(result: Tensor, gradient: Tensor) -> Tensor:
    """Round to the dtype of the gradient, where what was finite stays finite.

    A scaled value may be too large for the dtype, float16 above all, and becomes the largest number
    of its sign: an infinity would tell a gradient scaler that the loss had overflowed.

    Args:
        result: Values that are computed from those of gradient, of any dtype.
    """
    largest = torch.finfo(gradient.dtype).max
    clamped = result.clamp(-largest, largest)
    return torch.where(gradient.isfinite(), clamped, result).to(gradient.dtype)


def largest(score: Tensor, n: int) -> Tensor:
    """Mask the n largest along the last dimension; of equal ones the first is taken."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :n], True)


def magnitude_keep(values: Tensor, n: int) -> Tensor:
    """Mask the n largest |g| of each group (section III-B). NaN counts as larger than infinity."""
    return largest(values.abs(), n)


def random_keep(shape: torch.Size, seed: Tensor, n: int) -> Tensor:
    """Mask n positions of each group, each set of n as likely as any other (section III-B).

    Args:
        shape: (..., m), of the mask.
        seed: As for `prune_nm`.
    """
    m = shape[-1]
    words = [
        philox(seed, group_index(shape[:-1], seed.device), block) for block in range(-(-m // 4))
    ]
    scores = torch.stack([word for block in words for word in block], dim=-1)[..., :m]
    return largest(scores >> 6, n)


def rescaled_magnitude(values: Tensor, n: int, rescale: str) -> Tensor:
    """Prune by magnitude, and scale by sum |g| / sum |kept g| over the scope (III-B, Fig. 4)."""
    keep = magnitude_keep(values, n)
    return torch.where(keep, values * rescale_factor(values, keep, rescale), 0)


def rescale_factor(values: Tensor, keep: Tensor, rescale: str) -> Tensor:
    """Compute sum |g| / sum |kept g| over the rescale scope.

    A factor is 1 wherever the quotient is no finite number: nothing kept, or an overflow.

    Returns:
        Factors with the dimensions of values, those of the scope with size 1.
    """
    total, kept = values.abs(), torch.where(keep, values.abs(), 0)
    if rescale == "group":
        total, kept = (group_sum(t).unsqueeze(-1) for t in (total, kept))
    else:
        spatial = tuple(range(1, values.dim() - 2))
        scope = spatial if rescale == "feature_map" else (0, *spatial)
        if scope:
            total, kept = (t.sum(scope, keepdim=True) for t in (total, kept))
    factor = total / kept
    return torch.where(factor.isfinite(), factor, 1)


def mvue(values: Tensor, uniform: Tensor, n: int) -> Tensor:
    """Prune without bias, with the least variance that keeping n of m allows (Chmiel et al. 2023).

    Position i is kept with probability pi_i = min(1, c |g_i|), sum pi = n, and becomes
    g_i / pi_i, by systematic sampling: one uniform number for a group, and the positions kept
    where a prefix sum of pi passes uniform + an integer. Those with pi_i = 1 are set apart
    first, and the prefix sums of the others are integers in units of 2**-24, so that never
    more than n are kept. For the others g_i / pi_i is the same size, 1 / c = rest / room.

    A group whose sum |g| is not finite is pruned by magnitude, so that a NaN or an infinity
    is kept.

    Args:
        values: (..., m).
        uniform: (...) int64, 0 <= uniform < 2**24.
    """
    size = values.abs()
    certain = torch.zeros_like(size, dtype=torch.bool)
    room, rest = torch.full_like(size[..., 0], n), group_sum(size)
    finite = rest.isfinite()
    for _ in range(n):
        certain |= (size > 0) & (room.unsqueeze(-1) * size >= rest.unsqueeze(-1))
        room, rest = n - group_sum(certain.to(size.dtype)), group_sum(size.masked_fill(certain, 0))

    density = room / rest.masked_fill(rest == 0, 1)
    sampled, before = [], -uniform >> UNIFORM_BITS
    for prefix in itertools.accumulate(size.masked_fill(certain, 0).unbind(-1)):
        share = torch.where(prefix == rest, room, torch.minimum(prefix * density, room))
        share = share.masked_fill(~finite | (rest == 0), 0)
        passed = ((share * 2**UNIFORM_BITS).long() - uniform) >> UNIFORM_BITS
        sampled.append(passed > before)
        before = passed
    step = torch.copysign((rest / room).unsqueeze(-1), values)
    unbiased = torch.where(certain, values, torch.where(torch.stack(sampled, dim=-1), step, 0))
    by_magnitude = torch.where(magnitude_keep(values, n), values, 0)
    return torch.where(finite.unsqueeze(-1), unbiased, by_magnitude)


def group_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, one term after the other."""
    return functools.reduce(operator.add, values.unbind(-1))


def uniform(shape: torch.Size, seed: Tensor) -> Tensor:
    """Draw one number of 24 random bits for each group."""
    return philox(seed, group_index(shape, seed.device), 0)[0] >> (32 - UNIFORM_BITS)


def group_index(shape: torch.Size, device: torch.device) -> Tensor:
    """Number the groups (N, *spatial, C / m) of a gradient from 0, whatever its strides."""
    return torch.arange(shape.numel(), device=device).view(shape)


def philox(seed: Tensor, index: Tensor, block: int) -> list[Tensor]:
    """Draw four words of 32 random bits for each index, by Philox 4x32-10 (Salmon et al. 2011).

    The counter is (index mod 2**32, index // 2**32, block, 0).

    Args:
        seed: One int64, the key.
        index: int64.

    Returns:
        int64 tensors with the shape of index.
    """
    low = 0xFFFFFFFF
    key = [seed.reshape(()) & low, (seed.reshape(()) >> 32) & low]
    counter = [index & low, index >> 32, torch.full_like(index, block), torch.zeros_like(index)]
    for _ in range(10):
        low_0, high_0 = multiply_32(0xD2511F53, counter[0])
        low_2, high_2 = multiply_32(0xCD9E8D57, counter[2])
        counter = [high_2 ^ counter[1] ^ key[0], low_2, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def multiply_32(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and high 32 bits of factor * words.

    In halves, since int64 holds no unsigned 64-bit product.
    """
    lower, upper = factor * (words & 0xFFFF), factor * (words >> 16)
    upper = upper + (lower >> 16)
    return ((upper & 0xFFFF) << 16) | (lower & 0xFFFF), upper >> 16


def _required(seed: Tensor | None, prune: str) -> Tensor:
    if seed is None:
        raise ValueError(f"seed: expected one int64 for prune = {prune!r}, got None")
    return seed
