"""The functions of `kernels.reference`, written once more over Inductor's virtualized ops.

They compute with "group values", one value for each of the m channels of a group, in the shape
that suits the code generator:

- `Tile`, for Triton: a group value is a tile [groups, m]; what belongs to a group as a whole, such
  as its sum, is a reduction of a tile, [groups, 1].
- `Registers`, for C++: a group value is a list of m variables.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.virtualized import V, ops

from ..config import MAX_M
from ..kernels.reference import UNIFORM_BITS

Index = Sequence[Any]  # of sympy expressions
Variable = Any  # of the generated code
GroupValue = Any  # a variable, or a list of m


def prune_group(
    n: int,
    m: int,
    prune: str,
    dtype: torch.dtype,
    draw: Callable[[Index], tuple[Variable, Variable]],
    group: Tile | Registers,
    values: GroupValue,
    index: Index,
) -> GroupValue:
    """Prune a group.

    Args:
        n, m, prune: As in `SDGPConfig`; the scope of the rescaled magnitude is the group.
        dtype: The dtype of the gradient in memory.
        draw: Returns the seed, and the number of the group at index.
        group: How to compute with group values.
        values: The group's values in float32, as they are in memory.
        index: The index of the group: sample, group of channels, *spatial.

    Returns:
        The pruned values, of dtype.

    Raises:
        ValueError: There is no such pruning function.
    """
    if n == m:
        result = values
    elif prune == "magnitude":
        keep = _magnitude_keep(group, group.each(ops.abs, values), n, dtype)
        result = _kept(group, keep, values)
    elif prune == "rescaled_magnitude":
        result = _rescaled_magnitude(group, values, n, dtype)
    elif prune == "random":
        result = _kept(group, _random_keep(group, *draw(index), n), values)
    elif prune == "mvue":
        uniform = ops.bitwise_right_shift(_philox(*draw(index), 0)[0], _int64(32 - UNIFORM_BITS))
        result = _mvue(group, values, ops.to_dtype(uniform, torch.int32), n, dtype)
    else:
        raise ValueError(f"prune: the lowering has no pruning function {prune!r}")
    if dtype == torch.float32:
        return result
    return group.each(lambda value: ops.to_dtype(value, dtype), result)


class _Counter(DefaultHandler):
    """Count operations, without constants."""

    def __init__(self) -> None:
        self.count = 0

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.count += name != "constant"
        return name


@functools.cache
def count_operations(n: int, m: int, prune: str, dtype: torch.dtype) -> int:
    """Count the operations on a group in registers, once it has its values and its draw."""
    counter = _Counter()
    with V.set_ops_handler(counter):
        prune_group(n, m, prune, dtype, lambda index: ("", ""), Registers(m), [""] * m, [])
    return counter.count


class Tile:
    """Group values as tiles: a group value is [groups, m], a variable of the group [groups, 1].

    Args:
        position: The index of a channel in its group, a sympy expression.
    """

    def __init__(self, m: int, position: Any) -> None:
        self.m = m
        self.position = ops.index_expr(position, torch.int32)

    def each(self, function: Callable[..., Variable], *values: GroupValue) -> GroupValue:
        """Apply function at every position, to group values and to variables of the group."""
        return function(*values)

    def total(self, values: GroupValue) -> Variable:
        """Sum m float32 values."""
        return ops.reduction(torch.float32, torch.float32, "sum", values)

    def spread(self, variables: list[Variable]) -> GroupValue:
        """Return the group value of m variables."""
        result = variables[-1]
        for i in reversed(range(self.m - 1)):
            result = ops.where(self._is_at(i), variables[i], result)
        return result

    def columns(self, values: GroupValue) -> list[Variable]:
        """Return the m variables of a float32 group value.

        Each is a sum with zeros at all other positions. The bits are summed, as the compiler knows
        x + 0 to be x for every integer x.
        """
        bits = ops.to_dtype_bitcast(values, torch.int32, torch.float32)
        alone = [ops.where(self._is_at(i), bits, _int32(0)) for i in range(self.m)]
        sums = [ops.reduction(torch.int32, torch.int32, "sum", column) for column in alone]
        return [ops.to_dtype_bitcast(column, torch.float32, torch.int32) for column in sums]

    def largest(self, scores: GroupValue, n: int, free_bits: bool) -> GroupValue:
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


class Registers:
    """Group values as lists of m variables, with the methods of `Tile`."""

    def __init__(self, m: int) -> None:
        self.m = m

    def each(self, function: Callable[..., Variable], *values: GroupValue) -> GroupValue:
        lists = [value if isinstance(value, list) else [value] * self.m for value in values]
        return [function(*arguments) for arguments in zip(*lists, strict=True)]

    def total(self, values: GroupValue) -> Variable:
        return functools.reduce(ops.add, values)

    def spread(self, variables: list[Variable]) -> GroupValue:
        return variables

    def columns(self, values: GroupValue) -> list[Variable]:
        return values

    def largest(self, scores: GroupValue, n: int, free_bits: bool) -> GroupValue:
        """Mask as `Tile.largest` does, in 32 bits, which vectors have most of."""
        if free_bits:
            last_places = [_int32(self.m - 1 - i) for i in range(self.m)]
            keys = self.each(ops.bitwise_or, scores, last_places)
            return self.each(ops.ge, keys, _nth_largest(keys, n))
        # What is above the n-th largest, and of its equals the first that there is room for. Scores
        # have 31 bits, so their differences have a sign.
        below = self.each(ops.sub, _nth_largest(scores, n), scores)
        above = self.each(ops.bitwise_right_shift, below, _int32(31))
        room = ops.add(_int32(n), self.total(above))
        keep = []
        for difference in below:
            has_room = ops.to_dtype(ops.gt(room, _int32(0)), torch.int32)
            keep.append(ops.lt(difference, has_room))
            is_equal = ops.to_dtype(ops.eq(difference, _int32(0)), torch.int32)
            room = ops.sub(room, is_equal)
        return keep


def _nth_largest(keys: list[Variable], n: int) -> Variable:
    """Sort as far as the n-th of the descending keys needs it."""
    needed, comparators = {n - 1}, []
    for i, j in reversed(_sorting_network(len(keys))):
        if i in needed or j in needed:
            comparators.append((i, j, i in needed, j in needed))
            needed |= {i, j}
    keys = list(keys)
    for i, j, needs_larger, needs_smaller in reversed(comparators):
        a, b = keys[i], keys[j]
        if needs_larger:
            keys[i] = ops.maximum(a, b)
        if needs_smaller:
            keys[j] = ops.minimum(a, b)
    return keys[n - 1]


def _sorting_network(size: int) -> list[tuple[int, int]]:
    """Return the pairs of places that Batcher's odd-even merge sort compares, for a power of two.

    The larger key goes to the first of the two places.
    """

    def merge(places: range) -> list[tuple[int, int]]:
        if len(places) == 2:
            return [(places[0], places[1])]
        between = zip(places[1:-1:2], places[2::2], strict=True)
        return [*merge(places[::2]), *merge(places[1::2]), *between]

    def sort(places: range) -> list[tuple[int, int]]:
        if len(places) == 1:
            return []
        half = len(places) // 2
        return [*sort(places[:half]), *sort(places[half:]), *merge(places)]

    return sort(range(size))


def _magnitude_keep(
    group: Tile | Registers, size: GroupValue, n: int, dtype: torch.dtype
) -> GroupValue:
    """Mask the n largest of size |g|.

    Its bits compare as it does, and those of NaN are above infinity's.
    """

    def bits(size: Variable) -> Variable:
        return ops.to_dtype_bitcast(size, torch.int32, torch.float32)

    # A 16-bit value leaves at least 13 bits of the float32 zero.
    return group.largest(group.each(bits, size), n, free_bits=dtype.itemsize == 2)


def _random_keep(group: Tile | Registers, seed: Variable, number: Variable, n: int) -> GroupValue:
    words = [_philox(seed, number, block) for block in range(-(-group.m // 4))]

    def score(word: Variable) -> Variable:
        high = ops.bitwise_right_shift(word, _int64(6))
        return ops.to_dtype(ops.mul(high, _int64(MAX_M)), torch.int32)

    scores = [score(word) for word in itertools.chain(*words)][: group.m]
    return group.largest(group.spread(scores), n, free_bits=True)


def _rescaled_magnitude(
    group: Tile | Registers, values: GroupValue, n: int, dtype: torch.dtype
) -> GroupValue:
    size = group.each(ops.abs, values)
    keep = _magnitude_keep(group, size, n, dtype)
    factor = ops.truediv(group.total(size), group.total(_kept(group, keep, size)))
    is_finite = _is_finite(factor)
    factor = ops.where(is_finite, factor, _float32(1))
    # The limit is infinite for NaN and infinities, whose factor is 1.
    limit = ops.where(is_finite, _float32(torch.finfo(dtype).max), _float32(math.inf))

    def scaled(value: Variable, factor: Variable, limit: Variable) -> Variable:
        return ops.maximum(ops.minimum(ops.mul(value, factor), limit), ops.neg(limit))

    return _kept(group, keep, group.each(scaled, values, factor, limit))


def _mvue(
    group: Tile | Registers,
    values: GroupValue,
    uniform: Variable,
    n: int,
    dtype: torch.dtype,
) -> GroupValue:
    zero, one = _float32(0), _float32(1)

    def joins(size: Variable, room: Variable, rest: Variable) -> Variable:
        return ops.ge(ops.mul(room, size), rest)

    size = group.each(ops.abs, values)
    room, rest = _float32(n), group.total(size)
    finite = _is_finite(rest)
    uncertain = size
    for _ in range(n):
        # A zero joins only once the rest is zero, and then the room is not read any more.
        joining = group.each(joins, uncertain, room, rest)
        uncertain = group.each(ops.where, joining, zero, uncertain)
        room = ops.sub(room, group.total(group.each(ops.where, joining, one, zero)))
        rest = group.total(uncertain)
    certain = group.each(ops.ne, size, uncertain)

    # Prefix sums from the lowest channel up; their last is the sum that they have to reach.
    prefixes = list(itertools.accumulate(group.columns(uncertain), ops.add))
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

    def unbiased(
        value: Variable, certain: Variable, sampled: Variable, by_magnitude: Variable
    ) -> Variable:
        signed = ops.where(ops.lt(value, zero), ops.neg(step), step)
        drawn = ops.where(sampled, signed, zero)
        result = ops.where(certain, value, drawn)
        return ops.where(finite, result, ops.where(by_magnitude, value, zero))

    step = ops.minimum(ops.truediv(rest, room), _float32(torch.finfo(dtype).max))
    by_magnitude = _magnitude_keep(group, size, n, dtype)
    return group.each(unbiased, values, certain, group.spread(sampled), by_magnitude)


def _kept(group: Tile | Registers, keep: GroupValue, values: GroupValue) -> GroupValue:
    """Select values where keep, else 0."""
    return group.each(ops.where, keep, values, _float32(0))


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
