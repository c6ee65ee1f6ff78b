"""n:m pruning on the GPU.

Each kernel brings the m values of a group into m registers of one thread, chooses with
minimum/maximum networks, without branches, and writes the group back where it came from. Two
memory formats are read in place:

- channels last: a group is m neighbours in memory, so a tile is one run of it, in 16-byte
  accesses, taken apart in registers; only groups longer than an access change threads, through
  shared memory;
- NCHW: a group is m planes, so a tile is m runs, one of each plane.

Scope "group" is one launch that reads and writes the gradient once. Scope "feature_map" is one
launch in which a program reads its feature maps twice, the second time from L2 where they
fit. Scope "channel" adds a launch that only reads, for the sums of `channel_factor`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values a program holds, for a channels-last tile and for the planes of an NCHW tile: with 4
# warps 16 a thread, two 16-byte accesses of bfloat16. A group must fit a thread: 128 * m.
_TILE = 2048
_WARPS = 4
THREADS = 32 * _WARPS
# Programs that share the sums of scope "channel"; about four for each multiprocessor.
_SUM_PROGRAMS = 512
# What _prune_kernel has a branch for.
_PRUNING_FUNCTIONS = ("random", "magnitude", "rescaled_magnitude", "mvue")
# Fused multiply-adds would round otherwise than the reference, and choose otherwise.
LAUNCH = {"num_warps": _WARPS, "enable_fp_fusion": False}


# Tuples of registers


@triton.jit
def unzip(x, M: tl.constexpr):
    """Take [Q * M] apart into M tensors [Q]: the i-th of every M neighbours."""
    if M == 1:
        return (x,)
    else:
        even, odd = tl.split(tl.reshape(x, (x.numel // 2, 2)))
        evens = unzip(even, M // 2)
        odds = unzip(odd, M // 2)
        result = ()
        for i in tl.static_range(M // 2):
            result = result + (evens[i], odds[i])
        return result


@triton.jit
def rezip(values, M: tl.constexpr):
    """Join M tensors [Q] to [Q * M], the inverse of unzip."""
    if M == 1:
        return values[0]
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(M // 2):
            evens = evens + (values[2 * i],)
            odds = odds + (values[2 * i + 1],)
        x = tl.join(rezip(evens, M // 2), rezip(odds, M // 2))
        return tl.reshape(x, (x.numel,))


@triton.jit
def _merge(a, b, M: tl.constexpr):
    """Merge two descending tuples of M keys into one of 2 * M (Batcher's odd-even merge)."""
    if M == 1:
        return (tl.maximum(a[0], b[0]), tl.minimum(a[0], b[0]))
    else:
        a_even = ()
        a_odd = ()
        b_even = ()
        b_odd = ()
        for i in tl.static_range(M // 2):
            a_even = a_even + (a[2 * i],)
            a_odd = a_odd + (a[2 * i + 1],)
            b_even = b_even + (b[2 * i],)
            b_odd = b_odd + (b[2 * i + 1],)
        even = _merge(a_even, b_even, M // 2)
        odd = _merge(a_odd, b_odd, M // 2)
        result = (even[0],)
        for i in tl.static_range(M - 1):
            result = result + (
                tl.maximum(odd[i], even[i + 1]),
                tl.minimum(odd[i], even[i + 1]),
            )
        return result + (odd[M - 1],)


@triton.jit
def _sort(keys, M: tl.constexpr):
    """Sort M keys in descending order."""
    if M == 1:
        return keys
    else:
        low = ()
        high = ()
        for i in tl.static_range(M // 2):
            low = low + (keys[i],)
            high = high + (keys[M // 2 + i],)
        return _merge(_sort(low, M // 2), _sort(high, M // 2), M // 2)


@triton.jit
def _sum(values, M: tl.constexpr):
    """Sum M tensors, one after the other."""
    total = values[0]
    for i in tl.static_range(1, M):
        total += values[i]
    return total


@triton.jit
def _where(masks, values, M: tl.constexpr):
    """Select values where masks, else 0, for M pairs."""
    result = ()
    for i in tl.static_range(M):
        result = result + (tl.where(masks[i], values[i], 0.0),)
    return result


# Selection


@triton.jit
def _largest(scores, N: tl.constexpr, M: tl.constexpr):
    """Mask the N largest of M integers in [0, 2**26); of equal ones the first is taken.

    The low five bits of a key are the channel, so no two are equal. The compiler drops what
    the N-th place doesn't need of the sort.
    """
    keys = ()
    for i in tl.static_range(M):
        keys = keys + ((scores[i] << 5) | (M - 1 - i),)
    last = _sort(keys, M)[N - 1]
    result = ()
    for i in tl.static_range(M):
        result = result + (keys[i] >= last,)
    return result


@triton.jit
def _largest_wide(scores, N: tl.constexpr, M: tl.constexpr):
    """Mask as _largest, for integers in [0, 2**31), which leave no room for the channel."""
    last = _sort(scores, M)[N - 1]
    room = tl.zeros_like(last) + N
    for i in tl.static_range(M):
        room -= (scores[i] > last).to(tl.int32)
    result = ()
    for i in tl.static_range(M):
        equal = scores[i] == last
        result = result + ((scores[i] > last) | (equal & (room > 0)),)
        room -= equal.to(tl.int32)
    return result


@triton.jit
def _magnitude_keep(values, N: tl.constexpr, M: tl.constexpr):
    """Mask the N largest |g|, compared as integers; every NaN is one above infinity."""
    scores = ()
    if values[0].dtype == tl.float32:
        for i in tl.static_range(M):
            bits = values[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF
            scores = scores + (tl.minimum(bits, 0x7F800001),)
        return _largest_wide(scores, N, M)
    else:
        nan: tl.constexpr = 0x7C01 if values[0].dtype == tl.float16 else 0x7F81
        for i in tl.static_range(M):
            bits = values[i].to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
            scores = scores + (tl.minimum(bits, nan),)
        return _largest(scores, N, M)


@triton.jit
def _random_keep(seed, index, N: tl.constexpr, M: tl.constexpr):
    """Mask the N largest of M random words, four of them from each call of Philox."""
    scores = ()
    for block in tl.static_range((M + 3) // 4):
        words = _philox(seed, index, block)
        for i in tl.static_range(4 if M >= 4 else M):
            scores = scores + ((words[i] >> 6).to(tl.int32),)
    return _largest(scores, N, M)


@triton.jit
def _philox(seed, index, BLOCK: tl.constexpr):
    """Draw four random words for the 64-bit indices of groups."""
    index = index.to(tl.int64)
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0 + BLOCK, low * 0)


# Pruning functions, on M tensors of one value of each group


@triton.jit
def _rescale_factor(total, kept):
    """Compute total / kept, and 1 where nothing is kept or a sum overflows.

    A GPU's division may give 0 for a divisor above 2**126: the true factor is at least 1.
    """
    factor = tl.maximum(total / kept, 1.0)
    return tl.where((kept > 0.0) & (factor < float("inf")), factor, 1.0)


@triton.jit
def _mvue(values, magnitude_keep, size, uniform, N: tl.constexpr, M: tl.constexpr):
    """Prune as reference.mvue does, step by step; size is |g| in float32."""
    rest = _sum(size, M)
    finite = rest < float("inf")
    room = tl.zeros_like(rest) + N
    certain = ()
    for i in tl.static_range(M):
        certain = certain + (size[i] < 0.0,)
    open_size = size
    for _ in tl.static_range(N):
        grown = ()
        still_open = ()
        count = tl.zeros_like(rest)
        for i in tl.static_range(M):
            is_certain = certain[i] | ((size[i] > 0.0) & (room * size[i] >= rest))
            grown = grown + (is_certain,)
            still_open = still_open + (tl.where(is_certain, 0.0, size[i]),)
            count += tl.where(is_certain, 1.0, 0.0)
        certain = grown
        open_size = still_open
        room = N - count
        rest = _sum(open_size, M)

    sampling = finite & (rest > 0.0)
    density = tl.div_rn(room, tl.where(rest > 0.0, rest, 1.0))
    step = tl.minimum(tl.div_rn(rest, tl.maximum(room, 1.0)), _max(values[0].dtype))
    prefix = tl.zeros_like(rest)
    before = -uniform >> 24
    result = ()
    for i in tl.static_range(M):
        prefix += open_size[i]
        share = tl.where(prefix == rest, room, tl.minimum(prefix * density, room))
        share = tl.where(sampling, share, 0.0)
        passed = ((share * 16777216.0).to(tl.int32) - uniform) >> 24
        value = values[i].to(tl.float32)
        sampled = tl.where(passed > before, tl.where(value < 0.0, -step, step), 0.0)
        before = passed
        unbiased = tl.where(certain[i], value, sampled)
        by_magnitude = tl.where(magnitude_keep[i], value, 0.0)
        result = result + (tl.where(finite, unbiased, by_magnitude).to(values[i].dtype),)
    return result


@triton.jit
def _sizes(values, M: tl.constexpr):
    """Compute |g| in float32."""
    result = ()
    for i in tl.static_range(M):
        result = result + (tl.abs(values[i].to(tl.float32)),)
    return result


@triton.jit
def _max(dtype: tl.constexpr):
    """Return the largest finite number of a type."""
    if dtype == tl.float16:
        return 65504.0
    else:
        return 3.3895313892515355e38 if dtype == tl.bfloat16 else 3.4028234663852886e38


@triton.jit
def _scale(values, factors, M: tl.constexpr):
    """Multiply values by factors in float32, rounded to the values' type.

    What was finite stays finite, as with reference.saturated: where there is a NaN or an infinity,
    the factor is 1.
    """
    largest: tl.constexpr = _max(values[0].dtype)
    all_nan: tl.constexpr = tl.PropagateNan.ALL
    result = ()
    for i in tl.static_range(M):
        limit = tl.where(factors[i] > 1.0, largest, float("inf"))
        scaled = tl.minimum(values[i].to(tl.float32) * factors[i], limit, propagate_nan=all_nan)
        scaled = tl.maximum(scaled, -limit, propagate_nan=all_nan)
        result = result + (scaled.to(values[i].dtype),)
    return result


@triton.jit
def prune_groups(values, index, seed_ptr, N: tl.constexpr, M: tl.constexpr, PRUNE: tl.constexpr):
    """Prune where one group at a time is all that is needed.

    Args:
        values: M tensors of one value of each group.
        index: The numbers of the groups, as reference.group_index gives them.
        seed_ptr: For "random" and "mvue"; else None.

    Returns:
        M tensors, as values.
    """
    if PRUNE == "magnitude":
        result = _where(_magnitude_keep(values, N, M), values, M)
    elif PRUNE == "rescaled_magnitude":
        keep = _magnitude_keep(values, N, M)
        sizes = _sizes(values, M)
        factor = _rescale_factor(_sum(sizes, M), _sum(_where(keep, sizes, M), M))
        factors = ()
        for _ in tl.static_range(M):
            factors = factors + (factor,)
        result = _where(keep, _scale(values, factors, M), M)
    elif PRUNE == "random":
        result = _where(_random_keep(tl.load(seed_ptr), index, N, M), values, M)
    else:
        tl.static_assert(PRUNE == "mvue", "unknown pruning function")
        keep = _magnitude_keep(values, N, M)
        words = _philox(tl.load(seed_ptr), index, 0)
        uniform = (words[0] >> 8).to(tl.int32)
        result = _mvue(values, keep, _sizes(values, M), uniform, N, M)
    return result


# Kernels


@triton.jit
def _prune_kernel(
    x_ptr,
    out_ptr,
    seed_ptr,  # "random", "mvue"; else None
    factor_ptr,  # [channels], scope "channel"; else None
    size,  # values in channels last, groups in NCHW
    channels,
    spatial,
    N: tl.constexpr,
    M: tl.constexpr,
    PRUNE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,  # of size
):
    """Prune with scope "group", or by factors that are given. Grid: (ceil(size / BLOCK),)."""
    # size comes with 32 bits where they suffice, which keeps the divisions below cheap.
    start = tl.program_id(0).to(size.dtype) * BLOCK
    place = start + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < size - start
    if CHANNELS_LAST:
        values = unzip(tl.load(x_ptr + place, mask=mask, other=0.0), M)
        index = start // M + tl.arange(0, BLOCK // M)
    else:
        # Group (sample, c) at a position: M values, `spatial` apart.
        plane = place // spatial
        position = place % spatial
        step = spatial.to(tl.int64)
        first = plane.to(tl.int64) * M * step + position
        values = ()
        for i in tl.static_range(M):
            values = values + (tl.load(x_ptr + first + i * step, mask=mask, other=0.0),)
        blocks = channels // M
        index = (plane // blocks * spatial + position) * blocks + plane % blocks

    if factor_ptr is None:
        result = prune_groups(values, index, seed_ptr, N, M, PRUNE)
    else:
        factors = ()
        if CHANNELS_LAST:
            factors = unzip(tl.load(factor_ptr + place % channels), M)
        else:
            for i in tl.static_range(M):
                channel = plane % blocks * M + i
                factors = factors + (tl.load(factor_ptr + channel),)
        result = _where(_magnitude_keep(values, N, M), _scale(values, factors, M), M)

    if CHANNELS_LAST:
        tl.store(out_ptr + place, rezip(result, M), mask=mask)
    else:
        for i in tl.static_range(M):
            tl.store(out_ptr + first + i * step, result[i], mask=mask)


@triton.jit
def _tile(
    row,
    first_channel,
    channels,
    spatial,
    M: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Address ROWS positions of a sample from row on and COLUMNS channels.

    Returns their offsets in the sample, and a mask of those that exist.
    """
    if CHANNELS_LAST:
        place = tl.arange(0, ROWS * COLUMNS)
        position = row + place // COLUMNS
        channel = first_channel + place % COLUMNS
        return position.to(tl.int64) * channels + channel, (position < spatial) & (
            channel < channels
        )
    else:
        position = row + tl.arange(0, ROWS)
        return first_channel.to(tl.int64) * spatial + position, position < spatial


@triton.jit
def _load_tile(x_ptr, offsets, mask, spatial, M: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Load a tile [ROWS * COLUMNS], the channels of a position side by side."""
    if CHANNELS_LAST:
        return tl.load(x_ptr + offsets, mask=mask, other=0.0)
    else:
        step = spatial.to(tl.int64)
        values = ()
        for i in tl.static_range(M):
            values = values + (tl.load(x_ptr + offsets + i * step, mask=mask, other=0.0),)
        return rezip(values, M)


@triton.jit
def _scope_sums(
    x_ptr,
    begin,
    end,
    first_channel,
    channels,
    spatial,
    N: tl.constexpr,
    M: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute sum |g| and sum |kept g| of COLUMNS channels over positions [begin, end)."""
    total = tl.zeros((ROWS * COLUMNS,), tl.float32)
    kept = tl.zeros((ROWS * COLUMNS,), tl.float32)
    for row in range(begin, end, ROWS):
        offsets, mask = _tile(
            row, first_channel, channels, spatial, M, CHANNELS_LAST, ROWS, COLUMNS
        )
        x = _load_tile(x_ptr, offsets, mask, spatial, M, CHANNELS_LAST)
        values = unzip(x, M)
        keep = _magnitude_keep(values, N, M)
        total += tl.abs(x.to(tl.float32))
        kept += rezip(_where(keep, _sizes(values, M), M), M)
    total = tl.sum(tl.reshape(total, (ROWS, COLUMNS)), axis=0)
    kept = tl.sum(tl.reshape(kept, (ROWS, COLUMNS)), axis=0)
    return total, kept


@triton.jit
def _feature_map_kernel(
    x_ptr,
    out_ptr,
    channels,
    spatial,
    N: tl.constexpr,
    M: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Prune by rescaled magnitude, scope "feature_map".

    Grid: (samples, ceil(channels / COLUMNS)).
    """
    sample = tl.program_id(0).to(tl.int64) * channels * spatial
    first_channel = tl.program_id(1) * COLUMNS
    total, kept = _scope_sums(
        x_ptr + sample, 0, spatial, first_channel, channels, spatial,
        N, M, CHANNELS_LAST, ROWS, COLUMNS,
    )  # fmt: skip
    factor = tl.broadcast_to(_rescale_factor(total, kept)[None, :], (ROWS, COLUMNS))
    factors = unzip(tl.reshape(factor, (ROWS * COLUMNS,)), M)
    for row in range(0, spatial, ROWS):
        offsets, mask = _tile(
            row, first_channel, channels, spatial, M, CHANNELS_LAST, ROWS, COLUMNS
        )
        values = unzip(_load_tile(x_ptr + sample, offsets, mask, spatial, M, CHANNELS_LAST), M)
        keep = _magnitude_keep(values, N, M)
        result = _where(keep, _scale(values, factors, M), M)
        if CHANNELS_LAST:
            tl.store(out_ptr + sample + offsets, rezip(result, M), mask=mask)
        else:
            step = spatial.to(tl.int64)
            for i in tl.static_range(M):
                tl.store(out_ptr + sample + offsets + i * step, result[i], mask=mask)


@triton.jit
def _channel_sums_kernel(
    x_ptr,
    sums_ptr,  # [programs along axis 0, 2, channels] float32
    channels,
    spatial,
    chunk,  # positions for a program
    N: tl.constexpr,
    M: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute parts of the sums of scope "channel".

    Grid: (samples * ceil(spatial / chunk), ceil(channels / COLUMNS)).
    """
    part = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(spatial, chunk)
    sample = part // chunks * channels * spatial
    begin = (part % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, spatial)
    first_channel = tl.program_id(1) * COLUMNS
    total, kept = _scope_sums(
        x_ptr + sample, begin, end, first_channel, channels, spatial,
        N, M, CHANNELS_LAST, ROWS, COLUMNS,
    )  # fmt: skip
    channel = first_channel + tl.arange(0, COLUMNS)
    row = sums_ptr + part * 2 * channels
    tl.store(row + channel, total, mask=channel < channels)
    tl.store(row + channels + channel, kept, mask=channel < channels)


# Launchers


def prune_nm(
    grad_output: Tensor, seed: Tensor | None, n: int, m: int, prune: str, rescale: str
) -> Tensor:
    """Prune as `reference.prune_nm` does, in float32, bfloat16 and float16 on a GPU.

    Gradients that are neither channels last nor contiguous are copied once before and after.

    Args:
        grad_output, seed, n, m, prune, rescale: As for `reference.prune_nm`.

    Returns:
        As `reference.prune_nm`.

    Raises:
        ValueError: There is no such pruning function.
    """
    if prune not in _PRUNING_FUNCTIONS:
        raise ValueError(f"prune: the Triton kernels have no pruning function {prune!r}")
    out = torch.empty_like(grad_output)
    if n == m:
        return out.copy_(grad_output)
    if grad_output.numel() == 0:
        return out
    channels_last = grad_output.movedim(1, -1).is_contiguous()
    if channels_last or grad_output.is_contiguous():
        _prune_dense(grad_output, out, seed, n, m, prune, rescale, channels_last)
    else:
        dense = grad_output.contiguous()
        pruned = torch.empty_like(dense)
        _prune_dense(dense, pruned, seed, n, m, prune, rescale, channels_last=False)
        out.copy_(pruned)
    return out


def channel_factor(grad_output: Tensor, n: int, m: int) -> Tensor:
    """Compute what `reference.channel_factor` does, in float32, bfloat16 and float16 on a GPU.

    Gradients that are neither channels last nor contiguous are copied once before.

    Args:
        grad_output, n, m: As for `reference.channel_factor`.

    Returns:
        (C,), in float32.
    """
    samples, channels = grad_output.shape[:2]
    if grad_output.numel() == 0:
        return grad_output.new_ones((channels,), dtype=torch.float32)
    channels_last = grad_output.movedim(1, -1).is_contiguous()
    x = grad_output if channels_last else grad_output.contiguous()
    spatial = x.numel() // (samples * channels)
    rows, columns = scope_tile(m, channels, channels_last)
    column_programs = triton.cdiv(channels, columns)
    chunks = triton.cdiv(_SUM_PROGRAMS, samples * column_programs)
    chunk = rows * triton.cdiv(triton.cdiv(spatial, rows), chunks)
    parts = samples * triton.cdiv(spatial, chunk)
    sums = x.new_empty((parts, 2, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _channel_sums_kernel[(parts, column_programs)](
            x, sums, channels, spatial, chunk, n, m, channels_last, rows, columns, **LAUNCH
        )
    total, kept = sums.sum(0)
    factor = total / kept
    return torch.where(factor.isfinite(), factor, 1).clamp(min=1)


def _prune_dense(
    x: Tensor,
    out: Tensor,
    seed: Tensor | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    channels_last: bool,
) -> None:
    samples, channels = x.shape[:2]
    spatial = x.numel() // (samples * channels)
    scope = rescale if prune == "rescaled_magnitude" else "group"
    with torch.cuda.device_of(x):
        if scope == "feature_map":
            rows, columns = scope_tile(m, channels, channels_last)
            _feature_map_kernel[(samples, triton.cdiv(channels, columns))](
                x, out, channels, spatial, n, m, channels_last, rows, columns, **LAUNCH
            )
            return
        factor = channel_factor(x, n, m) if scope == "channel" else None
        size = x.numel() if channels_last else x.numel() // m
        block = group_block(m, channels_last, wide=x.numel() > torch.iinfo(torch.int32).max)
        _prune_kernel[(triton.cdiv(size, block),)](
            x, out, seed, factor, size, channels, spatial,
            n, m, prune, channels_last, block, **LAUNCH,
        )  # fmt: skip


def group_block(m: int, channels_last: bool, wide: bool = False) -> int:
    """Return BLOCK of `_prune_kernel`: values in channels last, groups in NCHW.

    Args:
        wide: Whether the sizes need 64 bits. So do then the positions in the planes, in registers
            that "mvue" has not got to spare (Triton 3.8 spills some).
    """
    if channels_last:
        return max(_TILE, THREADS * m)
    return max(THREADS, min(512 if wide else 1024, 2 * _TILE // m))


def scope_tile(m: int, channels: int, channels_last: bool) -> tuple[int, int]:
    """Return ROWS and COLUMNS of a tile of the kernels for the wider scopes."""
    columns = max(m, min(64, triton.next_power_of_2(channels))) if channels_last else m
    return max(_TILE, THREADS * m) // columns, columns
