"""Pruning of whole channels: which n of every m are kept, and what their values become.

Plain PyTorch: the pass traces these functions into the graph, for the compiler to fuse. All
shapes are known beforehand, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import accumulation_dtype


def channel_norms(grad_output: Tensor, dim: int) -> Tensor:
    """The L1 norm (C,) of each channel, of which dim is the dimension.

    In float32; float64 for a float64 gradient.
    """
    size, others = grad_output.abs(), [d for d in range(grad_output.dim()) if d != dim]
    dtype = accumulation_dtype(grad_output.dtype)
    if len(others) > 1:
        # Row by row: on a GPU that is part of the kernel that computes the gradient; on a CPU,
        # where Inductor's loop over channels is the outer one, a row stays in the cache.
        size = size.sum(others.pop(), dtype=dtype)
    return size.sum(others, dtype=dtype)


def take_channels(tensor: Tensor, index: Tensor, dim: int, is_channels_last: bool) -> Tensor:
    """tensor[index] along dim, of channels that are known to be there.

    is_channels_last: whether dimension 1 has stride 1, and keeps it.
    """
    if is_channels_last:
        taken = take_channels(tensor.movedim(1, -1), index, -1 if dim == 1 else dim, False)
        return taken.movedim(-1, 1)
    indices = [None] * (dim % tensor.dim()) + [index]
    # Private (checked on torch 2.11, 2.14 and 2.15): what Inductor makes of it has no bounds check.
    return torch.ops.aten._unsafe_index.Tensor(tensor, indices)


def select_channels(
    norms: Tensor, n: int, m: int, prune: str, draw: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Which channels are kept, and what their values are multiplied by.

    norms: (C,), C a multiple of m.
    draw: for "random" and "mvue", (C,) and (C / m,) int64, uniform in [0, 2**63 - 1).
    Returns int64 (C n / m,), the channels of one group of m after those of the group before it;
    and factors for them, of norms' dtype, or None where all are 1.

    The functions are those of `reference`, with a channel's norm for the size of a value: NaN is
    largest, of equal channels the lower one is kept, and mvue prunes a group whose norms have no
    finite sum by magnitude. "rescaled_magnitude" keeps the sum of the group's norms.
    """
    groups, factor = norms.view(-1, m), None
    keys = groups if prune != "random" or draw is None else draw.view(-1, m)
    order = torch.sort(keys, dim=-1, descending=True, stable=True)[1]
    if prune == "mvue" and draw is not None:
        place, factor = _sample(groups.gather(-1, order), draw, n)
        order = order.gather(-1, place)
    else:
        order = order[:, :n]
    if prune == "rescaled_magnitude":
        total, kept = (t.sum(-1, keepdim=True) for t in (groups, groups.gather(-1, order)))
        factor = total / kept
        factor = torch.where(factor.isfinite(), factor, 1).expand(-1, n)
    first = torch.arange(0, norms.numel(), m, device=norms.device).unsqueeze(-1)
    return (order + first).flatten(), None if factor is None else factor.flatten()


def _sample(sizes: Tensor, draw: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n of m places by systematic sampling, and the factors 1 / pi (Chmiel et al. 2023).

    What `reference.mvue` finds in n rounds is here in closed form, since sizes are in order: pi
    is 1 for the first, as many as have (n - i) size_i >= size_i + ... + size_(m-1), and the
    others share what room is left in proportion to their sizes. In float64, so that rounding
    can't have one place taken twice.

    sizes: (groups, m), descending. draw: (groups,).
    Returns int64 (groups, n), ascending and different, and factors (groups, n) of sizes' dtype.
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
