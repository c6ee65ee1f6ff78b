"""The packed format of sparse tensor cores: of every four channels two values, and their places.

`pack` and `unpack` are its reference in eager PyTorch, which the kernels must agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# What sparse tensor cores multiply two of four values of.
DTYPES = (torch.bfloat16, torch.float16)

# Channels whose places are one int16.
CHANNELS_OF_PLACES = 16

# The places (0, 1) in each of four groups, where nothing is kept.
EMPTY_PLACES = 0x4444


class Packed(NamedTuple):
    """A gradient (N, C, *positions) that keeps at most two of every four consecutive channels.

    Each dimension of positions has a halo on both sides, in which nothing is kept, so that a
    convolution reads no position that isn't there.

    The two values of a group of four are those that are not zero (NaN is not), in the order of
    their places. Where there are fewer, positive zeros fill the lowest places that are free.

    Attributes:
        values: (N, *positions with halo, C / 2), of the gradient's dtype.
        places: (N, *positions with halo, C / 16), int16. Each group has four bits, the lowest
            channels in the lowest: lower place | higher place << 2. In the halo it is 0x4444.
    """

    values: Tensor
    places: Tensor


def can_pack(n: int, m: int) -> bool:
    """Return whether n:m keeps at most two of every four consecutive channels."""
    return n <= 2 and 2 * n <= m


def empty_packed(gradient: Tensor, halo: Sequence[int]) -> Packed:
    """Return uninitialized tensors for a packed gradient.

    Args:
        gradient: (N, C, *positions), C a multiple of 16.
        halo: One size for each dimension of positions.

    Raises:
        ValueError: An argument is not as described here.
    """
    batch, channels, *positions = gradient.shape
    if channels % CHANNELS_OF_PLACES:
        raise ValueError(
            f"gradient: expected a multiple of {CHANNELS_OF_PLACES} channels, got {channels}"
        )
    if len(halo) != len(positions) or any(width < 0 for width in halo):
        raise ValueError(
            f"halo: expected a size of at least 0 for each of {len(positions)} dimension(s) of "
            f"positions, got {tuple(halo)}"
        )
    padded = (batch, *(size + 2 * width for size, width in zip(positions, halo, strict=True)))
    places = channels // CHANNELS_OF_PLACES
    return Packed(
        gradient.new_empty((*padded, channels // 2)),
        gradient.new_empty((*padded, places), dtype=torch.int16),
    )


def pack(pruned: Tensor, halo: Sequence[int]) -> Packed:
    """Pack a gradient that is pruned already.

    Args:
        pruned: (N, C, *positions), C a multiple of 16; any strides.
        halo: One size for each dimension of positions.

    Raises:
        ValueError: An argument is not as described here, or more than two of four consecutive
            channels are not zero.
    """
    values, places = empty_packed(pruned, halo)
    groups = pruned.movedim(1, -1).unflatten(-1, (pruned.shape[1] // 4, 4))
    kept = groups != 0
    if (kept.sum(-1) > 2).any():
        raise ValueError("pruned: expected at most two of every four channels that are not zero")
    # The kept ones first, then the free places, both from the lowest up: two of them.
    chosen = kept.byte().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    inner = _inner(values.shape[1:-1], halo)
    values.zero_()[inner] = torch.where(kept, groups, 0).gather(-1, chosen).flatten(-2)
    bits = (chosen[..., 0] | chosen[..., 1] << 2).unflatten(-1, (places.shape[-1], 4))
    places.fill_(EMPTY_PLACES)[inner] = (bits << _shifts(bits)).sum(-1).to(torch.int16)
    return Packed(values, places)


def unpack(packed: Packed, halo: Sequence[int]) -> Tensor:
    """Return the dense gradient (N, C, *positions), in channels-last memory.

    Args:
        packed: As from `pack`.
        halo: That of packed.
    """
    inner = _inner(packed.values.shape[1:-1], halo)
    values, places = packed.values[inner], packed.places[inner].unsqueeze(-1)
    bits = (places >> _shifts(places)).flatten(-2)
    chosen = torch.stack([bits & 3, bits >> 2 & 3], dim=-1).long()
    groups = values.new_zeros((*chosen.shape[:-1], 4))
    groups.scatter_(-1, chosen, values.unflatten(-1, chosen.shape[-2:]))
    return groups.flatten(-2).movedim(-1, 1)


def _inner(padded: Sequence[int], halo: Sequence[int]) -> tuple[slice, ...]:
    """Select the positions that are not in the halo."""
    return (slice(None), *(slice(w, size - w) for size, w in zip(padded, halo, strict=True)))


def _shifts(bits: Tensor) -> Tensor:
    """Return where the bits of each of four groups begin in an int16."""
    return torch.arange(0, 16, 4, dtype=bits.dtype, device=bits.device)
