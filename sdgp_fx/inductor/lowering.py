"""Inductor's lowering of sdgp::prune_nm: fused with what produces the gradient.

Importing this module registers it. The functions of `reference` are written once more, over
"group values": one value for each of the m channels of every group, in the shape that suits the
code generator.

- Triton: `_Tile`. A group value is a tile [groups, m]; what belongs to a group as a whole, such
  as its sum, is a reduction of a tile, [groups, 1]. The kernel then has the iteration space of
  the pointwise kernel that produces the gradient, and the scheduler makes them one: the gradient
  is pruned in registers, before it leaves for memory.
- C++: `_Registers`. The loop runs over groups, and a group value is a list of m variables.

Where `reason_not_fused` has a reason, the operator's own kernel is called.

The loops are subclasses of Inductor's private IR, checked on torch 2.11, 2.14 and 2.15.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from ..config import MAX_M
from ..kernels.op import PRUNE_NM
from ..kernels.reference import UNIFORM_BITS
from .scheduler_patch import keep_order

keep_order()

Index = Sequence[Any]  # of sympy expressions
Variable = Any  # of the generated code
GroupValue = Any  # a variable, or a list of m


def reason_not_fused(grad_output: ir.TensorBox, prune: str, rescale: str) -> str:
    """Why the operator's own kernel is called; "" if it is not."""
    if prune == "rescaled_magnitude" and rescale != "group":
        return "the factor needs sums over more than a group"
    if grad_output.get_dtype() == torch.float64:
        return "float64"
    if not isinstance(grad_output.get_size()[1], (int, sympy.Integer)):
        return "symbolic number of channels"
    if V.graph.sizevars.statically_known_equals(grad_output.get_numel(), 0):
        return "no values"
    device = grad_output.get_device_or_error().type
    generator = getattr(config, f"{device}_backend", None)
    if (device, generator) not in (("cpu", "cpp"), ("cuda", "triton")):
        return "no lowering for this code generator"
    # A tile is pruned where its reductions are made: they must not need a loop or an exchange.
    triton = config.triton
    whole = triton.persistent_reductions and not triton.multi_kernel
    whole = whole and not triton.cooperative_reductions
    if device == "cuda" and (triton.force_cooperative_reductions or not whole):
        return "an option splits Triton's reductions"
    return ""


@register_lowering(PRUNE_NM, type_promotion_kind=None)
def _prune_nm(
    grad_output: ir.TensorBox,
    seed: ir.TensorBox | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    groups: int,
) -> ir.TensorBox:
    # The weight gradient reads the same gradient, and other layers the same draw of seeds.
    grad_output.realize()
    if seed is not None:
        seed.realize()
    node = V.current_node
    order = _decide_stride_order(node)
    _reconsider_layout(grad_output, node.all_input_nodes[0], order)
    if reason_not_fused(grad_output, prune, rescale):
        call_kernel = fallback_handler(PRUNE_NM, add_to_fallback_set=False)
        return call_kernel(grad_output, seed, n, m, prune, rescale, groups)

    dtype, size = grad_output.get_dtype(), grad_output.get_size()

    def draw(index: Index) -> tuple[Variable, Variable]:
        """The seed, and the number of the group at index in channels-last order."""
        assert seed is not None
        sample, channel_group, *position = index
        numbers, number = (sample, *position, channel_group), sympy.S.Zero
        for i, count in zip(numbers, (size[0], *size[2:], FloorDiv(size[1], m)), strict=True):
            number = number * count + i
        load = seed.make_loader()
        return load([sympy.S.Zero] * len(seed.get_size())), ops.index_expr(number, torch.int64)

    on_gpu = grad_output.get_device_or_error().type == "cuda"
    prune_group = functools.partial(_prune_group, n, m, prune, dtype, draw)
    data: ir.Loops
    if on_gpu:
        data = TileLoops.over(grad_output, m, prune_group)
    else:
        data = RegisterLoops.over(grad_output, m, prune_group, _operations(n, m, prune, dtype))
    buffer = ir.ComputedBuffer(name=None, layout=_dense_layout(grad_output, order), data=data)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    if not on_gpu:
        V.graph.no_fuse_buffer_names.add(buffer.name)
        _wait_for_weight_grads(buffer, node.all_input_nodes[0])
    return ir.TensorBox.create(buffer)


def _decide_stride_order(node: fx.Node) -> Sequence[int]:
    """That of the input gradients computed from node, if they are its only use; and record it.

    The recorded strides are those of an eager run. A convolution's kernel wants those of its
    result, and Inductor makes a copy of what has others on record (checked on torch 2.14).
    """
    recorded, shape_env = node.meta["val"], V.graph.sizevars.shape_env
    order = ir.get_stride_order(recorded.stride(), shape_env)
    wanted = order
    for user in node.users:
        if user.target is not torch.ops.aten.convolution_backward.default:
            return order
        wanted = ir.get_stride_order(user.meta["val"][0].stride(), shape_env)
    _record_stride_order(node, wanted)
    return wanted


def _reconsider_layout(grad_output: ir.TensorBox, node: fx.Node, order: Sequence[int]) -> None:
    """Let grad_output have the strides that it would have without a prune.

    Inductor leaves the layout of a gradient to the convolution, if that alone uses it; but gives
    it the recorded strides early, if there is another use, which the prune is. As long as nothing
    reads it that can be taken back.
    """
    buffer = grad_output.data.data if isinstance(grad_output.data, ir.StorageBox) else None
    if not isinstance(buffer, ir.ComputedBuffer) or V.graph.name_to_users[buffer.get_name()]:
        return
    if isinstance(buffer.layout, ir.FixedLayout) and not buffer.layout.is_stride_ordered(order):
        buffer.layout = _dense_layout(grad_output, order)
        _record_stride_order(node, order)


def _wait_for_weight_grads(buffer: ir.ComputedBuffer, grad_output: fx.Node) -> None:
    """Have buffer computed after the weight gradients that were lowered from grad_output.

    Left to itself Inductor puts weight gradients off until they take the least memory, and so
    scatters library calls among the loops. But loops that have no call between them make one C++
    file, and compiling the files is most of what compiling takes. In the order of the graph
    without the pass, where both gradients are one call, there are about as many as there.
    """
    for user in grad_output.users:
        if user.target is torch.ops.aten.convolution_backward.default:
            lowered = [V.graph.env[grad] for grad in user.users if grad in V.graph.env]
            names = V.graph.additional_buffer_deps[buffer.get_operation_name()]
            names.update(grad.get_name() for grad in lowered)


def _dense_layout(like: ir.TensorBox, order: Sequence[int]) -> ir.FixedLayout:
    size = like.get_size()
    strides = ir.FlexibleLayout.stride_ordered(size, order)
    return ir.FixedLayout(like.get_device_or_error(), like.get_dtype(), size, strides)


def _record_stride_order(node: fx.Node, order: Sequence[int]) -> None:
    recorded = node.meta["val"]
    if ir.get_stride_order(recorded.stride(), V.graph.sizevars.shape_env) != order:
        outermost_first = sorted(range(recorded.dim()), key=order.__getitem__, reverse=True)
        dense = recorded.new_empty([recorded.shape[dim] for dim in outermost_first])
        node.meta["val"] = dense.permute([outermost_first.index(dim) for dim in range(dense.dim())])


# The loops


class TileLoops(ir.Sort):
    """Loops over groups, and within over m channels, that write every value.

    The loops of a sort are those of Inductor's that write along the dimension they reduce.
    """

    @classmethod
    def over(
        cls, grad_output: ir.TensorBox, m: int, prune_group: Callable[..., Variable]
    ) -> TileLoops:
        load, dtype = _stored(grad_output), grad_output.get_dtype()
        ranges = _groups(grad_output, m)

        def value(index: Index) -> Variable:
            group = [index[0], FloorDiv(index[1], m), *index[2:]]
            tile = _Tile(m, ModularIndexing(index[1], 1, m))
            return prune_group(tile, load(index), group)

        return cls(
            device=grad_output.get_device_or_error(),
            dtype=dtype,
            inner_fn=value,
            ranges=ranges,
            sort_ranges=[sympy.Integer(m)],
            size=[*ranges, sympy.Integer(m)],
            reindex=lambda group, position: [group[0], group[1] * m + position[0], *group[2:]],
            # With inner loops this short, a few hundred values a program and groups undivided.
            reduction_hint=ReductionHint.OUTER_TINY,
            output_index=0,
            dtypes=(dtype,),
            inner_fns=(value,),
            stable=True,
            descending=False,
        )

    def store_reduction(
        self, output_name: str | None, indexer: Any, vars: Index, reduction_vars: Index
    ) -> Any:
        index = self.reindex(vars, reduction_vars)
        return ops.store(output_name or "unnamed", indexer(index), self.inner_fn(index))


class RegisterLoops(ir.Pointwise):
    """Loops over groups that write m values each.

    They must not be fused with what reads the result: of several values stored under one name,
    the code generator would hand on the last.
    """

    @classmethod
    def over(
        cls,
        grad_output: ir.TensorBox,
        m: int,
        prune_group: Callable[..., list[Variable]],
        operations: int,
    ) -> RegisterLoops:
        """operations: how many prune_group has."""
        load = grad_output.make_loader()
        # Loops are not vectorized if 12% of their operations access memory with a stride, which
        # 2m do in channels_last (checked on torch 2.11, 2.14 and 2.15). Without vectors a prune
        # takes several times as long; an identity counts, and generates no code.
        wanted = math.ceil(2 * m / 0.12) + 1

        def values(group: Index) -> list[Variable]:
            gradient = [load(index) for index in _channels(group, m)]
            for _ in range(wanted - 2 * m - operations):
                gradient[0] = ops.identity(gradient[0])
            return prune_group(_Registers(m), gradient, group)

        return cls(
            device=grad_output.get_device_or_error(),
            dtype=grad_output.get_dtype(),
            inner_fn=values,
            ranges=_groups(grad_output, m),
        )

    def store_output(self, output_name: str | None, indexer: Any, vars: Index) -> Any:
        values = self.inner_fn(vars)
        for index, value in zip(_channels(vars, len(values)), values, strict=True):
            ops.store(output_name or "unnamed", indexer(index), value)


def _groups(grad_output: ir.TensorBox, m: int) -> list[Any]:
    """Sizes of (samples, groups of channels, *spatial)."""
    samples, channels, *spatial = grad_output.get_size()
    return [samples, FloorDiv(channels, m), *spatial]


def _channels(group: Index, m: int) -> list[Index]:
    """The indices of a group's m values."""
    return [[group[0], group[1] * m + i, *group[2:]] for i in range(m)]


def _stored(grad_output: ir.TensorBox) -> Callable[[Index], Variable]:
    """A loader in float32 that gives what is, or is about to be, in memory."""
    load, dtype = grad_output.make_loader(), grad_output.get_dtype()
    if dtype == torch.float32:
        return load

    def rounded(index: Index) -> Variable:
        # A value that this kernel has just computed comes in float32, not rounded.
        value = ops.to_dtype(load(index), dtype, src_dtype=torch.float32, use_compute_types=False)
        return ops.to_dtype(value, torch.float32, src_dtype=dtype)

    return rounded


# Group values


class _Tile:
    """A group value is one variable, a tile [groups, m]; a variable of the group is [groups, 1]."""

    def __init__(self, m: int, position: Any) -> None:
        self.m = m
        self.position = ops.index_expr(position, torch.int32)

    def each(self, function: Callable[..., Variable], *values: GroupValue) -> GroupValue:
        """function at every position, of group values and of variables of the group."""
        return function(*values)

    def total(self, values: GroupValue) -> Variable:
        """The sum of m float32 values."""
        return ops.reduction(torch.float32, torch.float32, "sum", values)

    def spread(self, variables: list[Variable]) -> GroupValue:
        """The group value of m variables."""
        result = variables[-1]
        for i in reversed(range(self.m - 1)):
            result = ops.where(self._is_at(i), variables[i], result)
        return result

    def columns(self, values: GroupValue) -> list[Variable]:
        """The m variables of a float32 group value: sums of it with zeros at other positions.

        Of the bits, as the compiler knows x + 0 to be x for every integer x.
        """
        bits = ops.to_dtype_bitcast(values, torch.int32, torch.float32)
        alone = [ops.where(self._is_at(i), bits, _int32(0)) for i in range(self.m)]
        sums = [ops.reduction(torch.int32, torch.int32, "sum", column) for column in alone]
        return [ops.to_dtype_bitcast(column, torch.float32, torch.int32) for column in sums]

    def largest(self, scores: GroupValue, n: int, free_bits: bool) -> GroupValue:
        """Mask of the n largest of int32 scores >= 0; of equal ones the lower position.

        free_bits: whether the low bits of all scores are zero, enough of them for a position.

        A reduction finds the largest, another the largest below that, and so on; or the smallest,
        where fewer are dropped than kept.
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


class _Registers:
    """A group value is a list of m variables."""

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
        """By rank: the number of scores that go before each.

        Before i goes every j < i, unless i is larger, and every larger j > i.
        """
        pairs = itertools.combinations(range(self.m), 2)
        larger = {(i, j): ops.to_dtype(ops.lt(scores[i], scores[j]), torch.int32) for i, j in pairs}
        keep = []
        for i in range(self.m):
            after = [larger[i, j] for j in range(i + 1, self.m)] or [_int32(0)]
            rank_less_i = functools.reduce(ops.add, after)
            for j in range(i):
                rank_less_i = ops.sub(rank_less_i, larger[j, i])
            keep.append(ops.lt(rank_less_i, _int32(n - i)))
        return keep


class _Counter(DefaultHandler):
    """Counts operations, without constants."""

    def __init__(self) -> None:
        self.count = 0

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.count += name != "constant"
        return name


@functools.cache
def _operations(n: int, m: int, prune: str, dtype: torch.dtype) -> int:
    """How many operations a group takes in registers, once it has its values and its draw."""
    counter = _Counter()
    with V.set_ops_handler(counter):
        _prune_group(n, m, prune, dtype, lambda index: ("", ""), _Registers(m), [""] * m, [])
    return counter.count


# The functions of `reference`


def _prune_group(
    n: int,
    m: int,
    prune: str,
    dtype: torch.dtype,
    draw: Callable[[Index], tuple[Variable, Variable]],
    group: _Tile | _Registers,
    values: GroupValue,
    index: Index,
) -> GroupValue:
    """draw: seed and number of the group at index."""
    if n == m:
        result = values
    elif prune == "magnitude":
        keep = _magnitude_keep(group, group.each(ops.abs, values), n, dtype)
        result = _kept(group, keep, values)
    elif prune == "rescaled_magnitude":
        result = _rescaled_magnitude(group, values, n, dtype)
    elif prune == "random":
        result = _kept(group, _random_keep(group, *draw(index), n), values)
    else:
        uniform = ops.bitwise_right_shift(_philox(*draw(index), 0)[0], _int64(32 - UNIFORM_BITS))
        result = _mvue(group, values, ops.to_dtype(uniform, torch.int32), n, dtype)
    if dtype == torch.float32:
        return result
    return group.each(lambda value: ops.to_dtype(value, dtype), result)


def _magnitude_keep(
    group: _Tile | _Registers, size: GroupValue, n: int, dtype: torch.dtype
) -> GroupValue:
    """Of size |g|. Its bits compare as it does, and those of NaN are above infinity's."""

    def bits(size: Variable) -> Variable:
        return ops.to_dtype_bitcast(size, torch.int32, torch.float32)

    # A 16-bit value leaves at least 13 bits of the float32 zero.
    return group.largest(group.each(bits, size), n, free_bits=dtype.itemsize == 2)


def _random_keep(group: _Tile | _Registers, seed: Variable, number: Variable, n: int) -> GroupValue:
    words = [_philox(seed, number, block) for block in range(-(-group.m // 4))]

    def score(word: Variable) -> Variable:
        high = ops.bitwise_right_shift(word, _int64(6))
        return ops.to_dtype(ops.mul(high, _int64(MAX_M)), torch.int32)

    scores = [score(word) for word in itertools.chain(*words)][: group.m]
    return group.largest(group.spread(scores), n, free_bits=True)


def _rescaled_magnitude(
    group: _Tile | _Registers, values: GroupValue, n: int, dtype: torch.dtype
) -> GroupValue:
    size = group.each(ops.abs, values)
    keep = _magnitude_keep(group, size, n, dtype)
    factor = ops.truediv(group.total(size), group.total(_kept(group, keep, size)))
    factor = ops.where(_is_finite(factor), factor, _float32(1))
    return _kept(group, keep, group.each(ops.mul, values, factor))


def _mvue(
    group: _Tile | _Registers,
    values: GroupValue,
    uniform: Variable,
    n: int,
    dtype: torch.dtype,
) -> GroupValue:
    zero, one = _float32(0), _float32(1)

    def joins(size: Variable, room: Variable, rest: Variable) -> Variable:
        return ops.logical_and(ops.gt(size, zero), ops.ge(ops.mul(room, size), rest))

    size = group.each(ops.abs, values)
    room, rest = _float32(n), group.total(size)
    finite = _is_finite(rest)
    certain, uncertain = None, size
    for _ in range(n):
        joining = group.each(joins, size, room, rest)
        certain = joining if certain is None else group.each(ops.logical_or, certain, joining)
        uncertain = group.each(ops.where, certain, zero, size)
        room = group.total(group.each(ops.where, certain, zero, one))
        room = ops.sub(room, _float32(group.m - n))
        rest = group.total(uncertain)

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

    step = ops.truediv(rest, room)
    by_magnitude = _magnitude_keep(group, size, n, dtype)
    return group.each(unbiased, values, certain, group.spread(sampled), by_magnitude)


def _kept(group: _Tile | _Registers, keep: GroupValue, values: GroupValue) -> GroupValue:
    """values, and 0 where keep is false."""
    return group.each(ops.where, keep, values, _float32(0))


def _is_finite(value: Variable) -> Variable:
    """Of a value that is not negative. NaN isn't."""
    return ops.lt(value, _float32(float("inf")))


def _philox(seed: Variable, number: Variable, block: int) -> list[Variable]:
    """reference.philox, of int64 variables."""
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
    """Bits 32 to 63 of an int64."""
    return ops.bitwise_and(ops.bitwise_right_shift(value, _int64(32)), _int64(0xFFFFFFFF))


def _multiply(factor: int, word: Variable) -> tuple[Variable, Variable]:
    """Low and high 32 bits of factor * word.

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
