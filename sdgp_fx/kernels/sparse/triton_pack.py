"""n:m pruning on the GPU into the packed format, in one launch.

A thread takes the channels of one position that have their places in one number, or a whole group
if that is longer: a run. It reads the run in 16-byte accesses, prunes and packs it in its
registers, and writes it in 16-byte accesses; only its places are two or four bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..op import check_arguments
from ..triton_prune import LAUNCH, THREADS, prune_groups, rezip, unzip
from .packed import CHANNELS_OF_PLACES, DTYPES, Packed, can_pack, empty_packed


@triton.jit
def _is_kept(value):
    """Tell a value from zeros of both signs, by its bits, as NaN and subnormal numbers are kept."""
    return (value.to(tl.int16, bitcast=True) & 0x7FFF) != 0


@triton.jit
def _pack(values):
    """Pack groups of four values, of which at most two are not zero.

    Returns the lower and the higher value, and the four bits of their places.
    """
    a, b, c, d = values
    keeps_a = _is_kept(a)
    keeps_b = _is_kept(b)
    keeps_c = _is_kept(c)
    keeps_d = _is_kept(d)
    # The places are 0 and 1 unless what is kept needs others.
    b_is_lower = keeps_b & (keeps_c | keeps_d)
    c_is_lower = keeps_c & keeps_d
    lower = tl.where(b_is_lower, b, tl.where(c_is_lower, c, tl.where(keeps_a, a, 0.0)))
    higher = tl.where(keeps_d, d, tl.where(keeps_c, c, tl.where(keeps_b, b, 0.0)))
    lower_place = tl.where(b_is_lower, 1, tl.where(c_is_lower, 2, 0))
    higher_place = tl.where(keeps_d, 3, tl.where(keeps_c, 2, 1))
    return lower, higher, lower_place | higher_place << 2


# One compiled kernel serves all sizes: a size of 1, or a multiple of 16, would make nothing faster.
@triton.jit(do_not_specialize=["size", "runs", "height", "width"])
def _prune_and_pack_kernel(
    x_ptr,  # [samples, height, width, channels]
    values_ptr,
    places_ptr,
    seed_ptr,  # "random", "mvue"; else None
    size,  # runs in the packed gradient
    runs,  # of a position
    height,
    width,
    HALO_H: tl.constexpr,
    HALO_W: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    PRUNE: tl.constexpr,
    RUN: tl.constexpr,  # channels
    BLOCK: tl.constexpr,  # runs
):
    """Prune with scope "group", and pack. Grid: (ceil(size / BLOCK),)."""
    # size comes with 32 bits where they suffice, which keeps the divisions below cheap.
    start = tl.program_id(0).to(size.dtype) * BLOCK
    rest = tl.minimum(size - start, BLOCK).to(tl.int32)
    run = start + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < rest
    if HALO_H + HALO_W > 0:
        # Unsigned, for cheaper divisions, and a position before the first is beyond the last.
        unsigned: tl.constexpr = tl.uint32 if size.dtype == tl.int32 else tl.uint64
        run = run.to(unsigned)
        runs = runs.to(unsigned)
        width = width.to(unsigned)
        height = height.to(unsigned)
        position = run // runs
        row = position // (width + 2 * HALO_W)
        sample = row // (height + 2 * HALO_H)
        x = position % (width + 2 * HALO_W) - HALO_W
        y = row % (height + 2 * HALO_H) - HALO_H
        inside = inside & (x < width) & (y < height)
        run = ((sample * height + y) * width + x) * runs + run % runs
    run = run.to(tl.int64)

    # What is not inside is zero, and zeros pack to what a halo has.
    offset = run[:, None] * RUN + tl.arange(0, 8)[None, :]
    values = ()
    for i in tl.static_range(RUN // 8):
        eight = tl.load(x_ptr + offset + 8 * i, mask=inside[:, None], other=0.0)
        values = values + unzip(tl.reshape(eight, (BLOCK * 8,)), 8)
    pruned = ()
    for i in tl.static_range(RUN // M):
        group = values[i * M : (i + 1) * M]
        pruned = pruned + prune_groups(group, run * (RUN // M) + i, seed_ptr, N, M, PRUNE)
    kept = ()
    bits = ()
    for i in tl.static_range(RUN // 4):
        lower, higher, both = _pack(pruned[4 * i : 4 * i + 4])
        kept = kept + (lower, higher)
        bits = bits + (both,)
    places = ()
    for i in tl.static_range(RUN // 16):
        a, b, c, d = bits[4 * i : 4 * i + 4]
        places = places + ((a | b << 4 | c << 8 | d << 12).to(tl.int16),)

    start = start.to(tl.int64)
    place = tl.arange(0, BLOCK * RUN // 2)
    mask = place < rest * (RUN // 2)
    tl.store(values_ptr + start * (RUN // 2) + place, rezip(kept, RUN // 2), mask=mask)
    place = tl.arange(0, BLOCK * RUN // 16)
    mask = place < rest * (RUN // 16)
    tl.store(places_ptr + start * (RUN // 16) + place, rezip(places, RUN // 16), mask=mask)


def prune_and_pack(
    grad_output: Tensor, seed: Tensor | None, n: int, m: int, prune: str, halo: Sequence[int]
) -> Packed:
    """Prune as `reference.prune_nm` does with scope "group", and pack as `pack` does.

    Args:
        grad_output: (N, C, *positions), with up to two dimensions of positions; C a multiple of 16
            and of m; bfloat16 or float16; channels-last memory.
        seed: One int64, for "random" and "mvue"; the other functions don't read it.
        n, m: A pattern that keeps at most two of every four channels: see `can_pack`.
        prune: The pruning function.
        halo: One size for each dimension of positions.

    Raises:
        ValueError: An argument is not as described here.
    """
    check_arguments(grad_output, seed, n, m, prune, "group", groups=1)
    if not can_pack(n, m):
        raise ValueError(f"n, m: expected at most two of every four channels, got {n}:{m}")
    if grad_output.dtype not in DTYPES:
        raise ValueError(f"grad_output: expected one of {DTYPES}, got {grad_output.dtype}")
    if grad_output.dim() > 4:
        raise ValueError(
            "grad_output: expected (N, C) and at most two dimensions more, got "
            f"{grad_output.dim() - 2}"
        )
    if not grad_output.movedim(1, -1).is_contiguous():
        raise ValueError(
            f"grad_output: expected channels-last memory, got {tuple(grad_output.shape)} with "
            f"strides {grad_output.stride()}"
        )
    packed = empty_packed(grad_output, halo)
    if packed.values.numel() == 0:
        return packed
    height, width = (1, 1, *grad_output.shape[2:])[-2:]
    halo_h, halo_w = (0, 0, *halo)[-2:]
    run = max(CHANNELS_OF_PLACES, m)
    size = 2 * packed.values.numel() // run
    with torch.cuda.device_of(grad_output):
        _prune_and_pack_kernel[(triton.cdiv(size, THREADS),)](
            grad_output, *packed, seed, size, grad_output.shape[1] // run, height, width,
            halo_h, halo_w, n, m, prune, run, THREADS, **LAUNCH,
        )  # fmt: skip
    return packed
