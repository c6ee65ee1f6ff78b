"""The functions of `kernels.reference`, written once more over Inductor's virtualized ops.

They compute with tiles: a variable of the generated code is [groups, m], with a value for each
channel of a group, or [groups, 1], where it belongs to the group as a whole. Those are reductions
of a tile, such as its sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.virtualized import ops

from ..config import MAX_M
from ..kernels.reference import UNIFORM_BITS

Index = Sequence[Any]  # of sympy expressions
Variable = Any  # of the generated code


def prune_group(
    n: int,
    m: int,
    prune: str,
    dtype: torch.dtype,
    draw: Callable[[Index], tuple[Variable, Variable]],
    tile: Tile,
    values: Variable,
    index: Index,
) -> Variable:
    """Prune groups.

    Args:
        n, m, prune: As in `SDGPConfig`; the scope of the rescaled magnitude is the group.
        dtype: The dtype of the gradient in memory.
        draw: Returns the seed, and the number of the group at index.
        tile: Of the groups.
        values: The groups' values in float32, as they are in memory.
        index: The index of a group: sample, group of channels, *spatial.

    Returns:
        The pruned values, of dtype.

    Raises:
        ValueError: There is no such pruning function.
    """
    if n == m:
        result = values
    elif prune == "magnitude":
        result = _kept(_magnitude_keep(tile, ops.abs(values), n, dtype), values)
    elif prune == "rescaled_magnitude":
        result = _rescaled_magnitude(tile, values, n, dtype)
    elif prune == "random":
        result = _kept(_random_keep(tile, *draw(index), n), values)
    elif prune == "mvue":
        uniform = ops.bitwise_right_shift(_philox(*draw(index), 0)[0], _int64(32 - UNIFORM_BITS))
        result = _mvue(tile, values, ops.to_dtype(uniform, torch.int32), n, dtype)
    else:
        raise ValueError(f"prune: the lowering has no pruning function {prune!r}")
    return result if dtype == torch.float32 else ops.to_dtype(result, dtype)


class Tile:
    """What is computed with the m channels of every group together.

    Args:
        position: The index of a channel in its group, a sympy expression.
    """

    def __init__(self, m: int, position: Any) -> None:
        self.m = m
        self.position = ops.index_expr(position, torch.int32)

    def total(self, values: Variable) -> Variable:
        """Sum m float32 values."""
        return ops.reduction(torch.float32, torch.float32, "sum", values)

    def spread(self, variables: list[Variable]) -> Variable:
        """Return the tile of m variables [groups, 1]."""
        result = variables[-1]
        for i in reversed(range(self.m - 1)):
            result = ops.where(self._is_at(i), variables[i], result)
        return result

    def columns(self, values: Variable) -> list[Variable]:
        """Return the m variables [groups, 1] of a float32 tile.

        Each is a sum with zeros at all other positions. The bits are summed, as the compiler knows
        x + 0 to be x for every integer x.
        """
        bits = ops.to_dtype_bitcast(values, torch.int32, torch.float32)
        alone = [ops.where(self._is_at(i), bits, _int32(0)) for i in range(self.m)]
        sums = [ops.reduction(torch.int32, torch.int32, "sum", column) for column in alone]
        return [ops.to_dtype_bitcast(column, torch.float32, torch.int32) for column in sums]

    def largest(self, scores: Variable, n: int, free_bits: bool) -> Variable:
        """Mask the n largest of int32 scores >= 0; of equal ones the lower position.

        A reduction finds the largest, another the largest below that, and so on; or the smallest,
        where fewer are dropped than kept.

        Args:
            free_bits: Whether the low bits of all scores are zero, enough of them for a position.
        """
        dtype = torch.int32
        if not free_bits:
            dtype = torch.int64
            scores = ops.mul(ops.to_dtype(scores, dtype), ops.constant(MAX_M, dtype))
        last = ops.sub(_int32(self.m - 1), self.position)
        keys = ops.bitwise_or(scores, ops.to_dtype(last, dtype))
        drop = n > self.m - n
        kind: Any = "min" if drop else "max"
        further = ops.gt if drop else ops.lt
        none = ops.constant(torch.iinfo(dtype).max if drop else -1, dtype)
        bound = ops.reduction(dtype, dtype, kind, keys)
        for _ in range(min(n, self.m - n) - 1):
            rest = ops.where(further(keys, bound), keys, none)
            bound = ops.reduction(dtype, dtype, kind, rest)
        return ops.gt(keys, bound) if drop else ops.ge(keys, bound)

    def _is_at(self, i: int) -> Variable:
        return ops.eq(self.position, _int32(i))


def _magnitude_keep(tile: Tile, size: Variable, n: int, dtype: torch.dtype) -> Variable:
    """Mask the n largest of size |g|.

    Its bits compare as it does, and those of NaN are above infinity's.
    """
    bits = ops.to_dtype_bitcast(size, torch.int32, torch.float32)
    # A 16-bit value leaves at least 13 bits of the float32 zero.
    return tile.largest(bits, n, free_bits=dtype.itemsize == 2)


def _random_keep(tile: Tile, seed: Variable, number: Variable, n: int) -> Variable:
    words = [_philox(seed, number, block) for block in range(-(-tile.m // 4))]

    def score(word: Variable) -> Variable:
        high = ops.bitwise_right_shift(word, _int64(6))
        return ops.to_dtype(ops.mul(high, _int64(MAX_M)), torch.int32)

    scores = [score(word) for word in itertools.chain(*words)][: tile.m]
    return tile.largest(tile.spread(scores), n, free_bits=True)


def _rescaled_magnitude(tile: Tile, values: Variable, n: int, dtype: torch.dtype) -> Variable:
    size = ops.abs(values)
    keep = _magnitude_keep(tile, size, n, dtype)
    factor = ops.truediv(tile.total(size), tile.total(_kept(keep, size)))
    is_finite = _is_finite(factor)
    factor = ops.where(is_finite, factor, _float32(1))
    # The limit is infinite for NaN and infinities, whose factor is 1.
    limit = ops.where(is_finite, _float32(torch.finfo(dtype).max), _float32(math.inf))
    scaled = ops.maximum(ops.minimum(ops.mul(values, factor), limit), ops.neg(limit))
    return _kept(keep, scaled)


def _mvue(tile: Tile, values: Variable, uniform: Variable, n: int, dtype: torch.dtype) -> Variable:
    zero, one = _float32(0), _float32(1)
    size = ops.abs(values)
    room, rest = _float32(n), tile.total(size)
    finite = _is_finite(rest)
    uncertain = size
    for _ in range(n):
        # A zero joins only once the rest is zero, and then the room is not read any more.
        joining = ops.ge(ops.mul(room, uncertain), rest)
        uncertain = ops.where(joining, zero, uncertain)
        room = ops.sub(room, tile.total(ops.where(joining, one, zero)))
        rest = tile.total(uncertain)
    certain = ops.ne(size, uncertain)

    # Prefix sums from the lowest channel up; their last is the sum that they have to reach.
    prefixes = list(itertools.accumulate(tile.columns(uncertain), ops.add))
    rest = prefixes[-1]
    some = ops.logical_and(finite, ops.gt(rest, zero))
    density = ops.truediv(room, ops.where(some, rest, one))
    sampled, before = [], ops.bitwise_right_shift(ops.sub(_int32(0), uniform), _int32(UNIFORM_BITS))
    for prefix in prefixes:
        share = ops.minimum(ops.mul(prefix, density), room)
        share = ops.where(ops.eq(prefix, rest), room, share)
        share = ops.mul(ops.where(some, share, zero), _float32(2**UNIFORM_BITS))
        units = ops.sub(ops.to_dtype(share, torch.int32), uniform)
        passed = ops.bitwise_right_shift(units, _int32(UNIFORM_BITS))
        sampled.append(ops.gt(passed, before))
        before = passed

    step = ops.minimum(ops.truediv(rest, room), _float32(torch.finfo(dtype).max))
    signed = ops.where(ops.lt(values, zero), ops.neg(step), step)
    drawn = ops.where(tile.spread(sampled), signed, zero)
    result = ops.where(certain, values, drawn)
    by_magnitude = _kept(_magnitude_keep(tile, size, n, dtype), values)
    return ops.where(finite, result, by_magnitude)


def _kept(keep: Variable, values: Variable) -> Variable:
    """Select values where keep, else 0."""
    return ops.where(keep, values, _float32(0))


def _is_finite(value: Variable) -> Variable:
    """Whether a value that is not negative is finite; NaN isn't."""
    return ops.lt(value, _float32(math.inf))


def _philox(seed: Variable, number: Variable, block: int) -> list[Variable]:
    """Draw as `reference.philox` does, from int64 variables."""
    low = _int64(0xFFFFFFFF)
    key = [ops.bitwise_and(seed, low), _high(seed)]
    counter = [ops.bitwise_and(number, low), _high(number), _int64(block), _int64(0)]
    for _ in range(10):
        low_0, high_0 = _multiply(0xD2511F53, counter[0])
        low_2, high_2 = _multiply(0xCD9E8D57, counter[2])
        counter = [
            ops.bitwise_xor(ops.bitwise_xor(high_2, counter[1]), key[0]),
            low_2,
            ops.bitwise_xor(ops.bitwise_xor(high_0, counter[3]), key[1]),
            low_0,
        ]
        key = [
            ops.bitwise_and(ops.add(word, _int64(step)), low)
            for word, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        ]
    return counter


def _high(value: Variable) -> Variable:
    """Return bits 32 to 63 of an int64."""
    return ops.bitwise_and(ops.bitwise_right_shift(value, _int64(32)), _int64(0xFFFFFFFF))


def _multiply(factor: int, word: Variable) -> tuple[Variable, Variable]:
    """Return the low and high 32 bits of factor * word.

    factor - 2**32, for a factor above 2**31, is small enough to overflow no int64.
    """
    product = ops.mul(word, _int64(factor - 2**32))
    high = ops.add(ops.bitwise_right_shift(product, _int64(32)), word)
    low = _int64(0xFFFFFFFF)
    return ops.bitwise_and(product, low), ops.bitwise_and(high, low)


def _int32(value: int) -> Variable:
    return ops.constant(value, torch.int32)


def _int64(value: int) -> Variable:
    return ops.constant(value, torch.int64)


def _float32(value: float) -> Variable:
    return ops.constant(float(value), torch.float32)
