"""Prune n:m by hand: in plain Python, one group at a time.

Transcribed from McDanel et al. 2022 and Chmiel et al. 2023. The reference is compared with it, so
it shares nothing with sdgp_fx.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import torch


def groups(tensor, m):
    """Return (number of groups, m): a row for every group, by sample, position and channel."""
    return tensor.movedim(1, -1).reshape(-1, m)


def ungrouped(rows, like):
    """Return the tensor of like's shape and dtype that has these groups."""
    values = torch.tensor(rows, dtype=torch.float64).view(like.movedim(1, -1).shape)
    return stored(values.movedim(-1, 1), like)


def stored(values, like):
    """Return float64 values in like's dtype; those of finite ones in like are finite in it."""
    largest = torch.finfo(like.dtype).max
    return torch.where(like.isfinite(), values.clamp(-largest, largest), values).to(like.dtype)


def rounding(dtype):
    """Return a function that rounds a float to the type in which this dtype is summed."""

    def to_float32(value):
        with np.errstate(over="ignore"):
            return float(np.float32(value))

    return float if dtype == torch.float64 else to_float32


# Selection


def kept(sizes, n):
    """Return the positions of the n largest; NaN ranks above infinity, ties go to the lower."""

    def rank(i):
        return (0, 0, i) if math.isnan(sizes[i]) else (1, -sizes[i], i)

    return set(sorted(range(len(sizes)), key=rank)[:n])


def only(positions, row):
    return [g if i in positions else 0.0 for i, g in enumerate(row)]


def magnitude(row, n):
    return only(kept([abs(g) for g in row], n), row)


def philox(seed, index, block):
    """Draw four words of 32 bits by Philox 4x32-10 (Salmon et al. 2011)."""
    low = 2**32 - 1
    key = [seed & low, (seed >> 32) & low]
    counter = [index & low, index >> 32, block, 0]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & low,
            (first >> 32) ^ counter[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


# Seeds with which the uniform number of group 0 is the smallest, 0, and the largest, 2**24 - 1.
SMALLEST_UNIFORM, LARGEST_UNIFORM = 12121362, 16390493


def random(row, n, seed, index):
    """Keep the n positions with the largest words, of which 26 bits count."""
    words = [word >> 6 for block in range(len(row)) for word in philox(seed, index, block)]
    return only(kept(words[: len(row)], n), row)


# Rescaling


def factor(total, kept_total, rounded):
    """Return total / kept_total where that is a finite number, else 1."""
    ratio = rounded(total / kept_total) if kept_total else math.inf
    return ratio if math.isfinite(ratio) else 1.0


def rescaled_group(row, n, rounded):
    """Rescale in scope "group": sum from the lowest channel up, and round every operation."""

    def total(values):
        return functools.reduce(lambda a, b: rounded(a + b), map(abs, values))

    chosen = magnitude(row, n)
    ratio = factor(total(row), total(chosen), rounded)
    return [rounded(g * ratio) for g in chosen]


def rescaled_scope(gradient, chosen, rescale, rounded):
    """Multiply chosen, in float64, by the factor of each channel, or each channel of a sample."""
    result = chosen.double().clone()
    samples = range(len(gradient)) if rescale == "feature_map" else [slice(None)]
    for sample in samples:
        for channel in range(gradient.shape[1]):
            sums = [
                rounded(sum(map(abs, t[sample, channel].flatten().tolist())))
                for t in (gradient, chosen)
            ]
            result[sample, channel] *= factor(*sums, rounded)
    return result


# Minimum variance


def probabilities(sizes, n):
    """Solve pi_i = min(1, c size_i), sum pi = n, exactly.

    If at most n sizes are not 0, their pi is 1.
    """
    sizes = [Fraction(size) for size in sizes]
    positive = sorted((size for size in sizes if size), reverse=True)
    if len(positive) <= n:
        return [Fraction(size > 0) for size in sizes]
    for certain in range(n):
        c = (n - certain) / sum(positive[certain:])
        if c * positive[certain] <= 1:
            return [min(Fraction(1), c * size) for size in sizes]
    raise AssertionError("with one place left, no probability is above 1")


def mvue(row, n, uniform):
    """Keep n by systematic sampling with one uniform number, 0 <= uniform < 1.

    A kept value g becomes g / pi.

    Returns:
        The row, and how far the number is from one that keeps others.
    """
    pi = probabilities([abs(g) for g in row], n)
    result, prefix, uniform = [], Fraction(0), Fraction(uniform)
    margin = min(uniform, 1 - uniform)
    for g, p in zip(row, pi, strict=True):
        is_kept = p == 1
        if p < 1:
            before, prefix = prefix, prefix + p
            is_kept = math.floor(prefix - uniform) > math.floor(before - uniform)
            distance = (prefix - uniform) % 1
            margin = min(margin, distance, 1 - distance)
        result.append(float(Fraction(g) / p) if is_kept else 0.0)
    return result, margin
