"""Prune whole channels: choose n of every m, and the factors of those that are kept.

Plain PyTorch: the pass traces these functions into the graph, for the compiler to fuse. All
shapes are known beforehand, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import accumulation_dtype, saturated


def channel_norms(grad_output: Tensor, dim: int) -> Tensor:
    """Compute per-channel L1 norms.

    Args:
        dim: The dimension of the channels.

    Returns:
        (C,), in float32; in float64 for a float64 gradient.
    """
    size, others = grad_output.abs(), [d for d in range(grad_output.dim()) if d != dim]
    dtype = accumulation_dtype(grad_output.dtype)
    if len(others) > 1:
        # Row by row: on a GPU that is part of the kernel that computes the gradient; on a CPU,
        # where Inductor's loop over channels is the outer one, a row stays in the cache.
        size = size.sum(others.pop(), dtype=dtype)
    return size.sum(others, dtype=dtype)


def take_channels(tensor: Tensor, index: Tensor, dim: int, is_channels_last: bool) -> Tensor:
    """Return tensor[index] along dim, without a check that the channels exist.

    Args:
        is_channels_last: Whether dimension 1 has stride 1, and keeps it.
    """
    if is_channels_last:
        taken = take_channels(tensor.movedim(1, -1), index, -1 if dim == 1 else dim, False)
        return taken.movedim(-1, 1)
    indices = [None] * (dim % tensor.dim()) + [index]
    return torch.ops.aten._unsafe_index.Tensor(tensor, indices)


def select_channels(
    norms: Tensor, n: int, m: int, prune: str, draw: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose n channels of each group of m.

    The pruning functions are those of `reference`, with a channel's norm for the size of a value:
    NaN is largest, and of equal channels the lower one is kept.

    Args:
        norms: (C,), C a multiple of m.
        prune: The pruning function.
        draw: int64, uniform in [0, 2**63 - 1): (C,) for "random", (C / m,) for "mvue".

    Returns:
        The channels that are kept, int64 (C n / m,), group after group; and what their values are
        multiplied by, of the dtype of norms, or None where all factors are 1.

    Raises:
        ValueError: There is no such pruning function, or it needs draw and there is none.
    """
    groups = norms.view(-1, m)
    factor = None
    if prune == "magnitude":
        place = _magnitude(groups, n)
    elif prune == "rescaled_magnitude":
        place, factor = _rescaled_magnitude(groups, n)
    elif prune == "random":
        place = _magnitude(_required(draw, prune).view(-1, m), n)
    elif prune == "mvue":
        place, factor = _mvue(groups, _required(draw, prune), n)
    else:
        raise ValueError(f"prune: whole channels have no pruning function {prune!r}")
    first = torch.arange(0, norms.numel(), m, device=norms.device).unsqueeze(-1)
    return (place + first).flatten(), None if factor is None else factor.flatten()


def scale_channels(kept: Tensor, factor: Tensor, dim: int) -> Tensor:
    """Multiply channels by their factors; what is finite stays so, as with `reference.saturated`.

    Args:
        factor: Of `select_channels`.
        dim: The dimension of the channels.
    """
    return saturated(kept * factor.view(-1, *[1] * (kept.dim() - 1 - dim)), kept)


def _descending(groups: Tensor) -> Tensor:
    """Return the places in each group from the largest to the smallest; equal ones in order."""
    return torch.sort(groups, dim=-1, descending=True, stable=True)[1]


def _magnitude(groups: Tensor, n: int) -> Tensor:
    """Return the places of the n largest of each group (groups, m): int64 (groups, n)."""
    return _descending(groups)[:, :n]


def _rescaled_magnitude(groups: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Choose by magnitude, with factors that keep the sum of each group's norms."""
    place = _magnitude(groups, n)
    total, kept = (t.sum(-1, keepdim=True) for t in (groups, groups.gather(-1, place)))
    factor = total / kept
    return place, torch.where(factor.isfinite(), factor, 1).expand(-1, n)


def _mvue(groups: Tensor, draw: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Choose without bias, with factors 1 / pi; a group without a finite sum by magnitude."""
    order = _descending(groups)
    rank, factor = _sample(groups.gather(-1, order), draw, n)
    return order.gather(-1, rank), factor


def _sample(sizes: Tensor, draw: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Choose n of m places by systematic sampling (Chmiel et al. 2023).

    What `reference.mvue` finds in n rounds is here in closed form, since sizes are in order: pi
    is 1 for the first, as many as have (n - i) size_i >= size_i + ... + size_(m-1), and the
    others share what room is left in proportion to their sizes. In float64, so that rounding
    can't have one place taken twice.

    Args:
        sizes: (groups, m), descending.
        draw: (groups,).

    Returns:
        The places, int64 (groups, n), ascending and different; and the factors 1 / pi (groups, n),
        of the dtype of sizes.
    """
    dtype, m = sizes.dtype, sizes.shape[-1]
    sizes = sizes.double()
    place = torch.arange(m, device=sizes.device)
    slot = place[:n]
    total = sizes.sum(-1, keepdim=True)
    rests = sizes.flip(-1).cumsum(-1).flip(-1)
    certain = (sizes > 0) & ((n - place) * sizes >= rests)
    taken = certain.sum(-1, keepdim=True)
    shares = sizes.masked_fill(certain, 0).cumsum(-1)
    rest = shares[:, -1:]

    step = rest / (n - taken)  # Not used where nothing is left to take.
    uniform = (draw >> 10).double().unsqueeze(-1) * 2.0**-53
    wanted = (slot + uniform - taken) * step
    passed = (shares.unsqueeze(-2) <= wanted.unsqueeze(-1)).sum(-1).clamp(max=m - 1)
    is_drawn = (slot >= taken) & (rest > 0) & total.isfinite()
    chosen = torch.where(is_drawn, passed, slot)
    factor = (step / sizes.gather(-1, chosen)).clamp(max=torch.finfo(dtype).max)
    return chosen, torch.where(is_drawn, factor, 1).to(dtype)


def _required(draw: Tensor | None, prune: str) -> Tensor:
    if draw is None:
        raise ValueError(f"draw: expected random numbers for prune = {prune!r}, got None")
    return draw
