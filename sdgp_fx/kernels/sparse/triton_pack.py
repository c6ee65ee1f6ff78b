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
from .packed import CHANNELS_OF_PLACES, Packed, can_pack, empty_packed

DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _pack(values):
    """Pack groups of four values, given as 16-bit integers, of which at most two are not zero.

    Returns the lower and the higher value, and the four bits of their places.
    """
    a, b, c, d = values
    has_a = (a & 0x7FFF) != 0
    has_b = (b & 0x7FFF) != 0
    has_c = (c & 0x7FFF) != 0
    has_d = (d & 0x7FFF) != 0
    # The lower place is 0, and the higher 1, unless they must be another.
    low_b = has_b & (has_c | has_d)
    low_c = has_c & has_d
    lower = tl.where(low_b, b, tl.where(low_c, c, tl.where(has_a, a, 0)))
    higher = tl.where(has_d, d, tl.where(has_c, c, tl.where(has_b & ~low_b, b, 0)))
    lower_place = tl.where(low_b, 1, tl.where(low_c, 2, 0))
    higher_place = tl.where(has_d, 3, tl.where(has_c, 2, 1))
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
        position = run // runs
        row = position // (width + 2 * HALO_W)
        sample = row // (height + 2 * HALO_H)
        x = position % (width + 2 * HALO_W) - HALO_W
        y = row % (height + 2 * HALO_H) - HALO_H
        inside = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        run = ((sample * height + y) * width + x) * runs + run % runs

    run = run.to(tl.int64)[:, None]
    offset = run * RUN + tl.arange(0, 8)[None, :]
    values = ()
    for i in tl.static_range(RUN // 8):
        # What is not inside is zero, and zeros pack to what a halo has.
        eight = tl.load(x_ptr + offset + 8 * i, mask=inside[:, None], other=0.0)
        values = values + unzip(tl.reshape(eight, (BLOCK * 8,)), 8)
    values = unzip(rezip(values, RUN), M)
    index = tl.reshape(run * (RUN // M) + tl.arange(0, RUN // M)[None, :], (BLOCK * RUN // M,))

    pruned = rezip(prune_groups(values, index, seed_ptr, N, M, PRUNE), M)
    lower, higher, places = _pack(unzip(pruned.to(tl.int16, bitcast=True), 4))
    values = rezip((lower, higher), 2).to(pruned.dtype, bitcast=True)
    a, b, c, d = unzip(places, 4)
    places = (a | b << 4 | c << 8 | d << 12).to(tl.int16)

    start = start.to(tl.int64)
    place = tl.arange(0, BLOCK * RUN // 2)
    tl.store(values_ptr + start * (RUN // 2) + place, values, mask=place < rest * (RUN // 2))
    place = tl.arange(0, BLOCK * RUN // 16)
    tl.store(places_ptr + start * (RUN // 16) + place, places, mask=place < rest * (RUN // 16))


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
