"""Gradients to compare kernels on."""

import torch


def special(shape, dtype):
    """Make a gradient of random and special numbers.

    The special ones are ties, zeros of both signs, subnormal, smallest and largest numbers, NaN and
    infinities.
    """
    info = torch.finfo(dtype)
    palette = [0.0, -0.0, 1.0, -1.0, 1 + info.eps, info.tiny / 2, -info.tiny, 2.0]
    palette += [float("nan"), float("inf"), -float("inf"), info.max, info.min]
    palette = torch.tensor(palette, dtype=torch.float64).to(dtype)
    x = torch.randn(shape).to(dtype)
    drawn = palette[torch.randint(len(palette), shape)]
    # Most groups see finite numbers only: one NaN decides the outcome of a whole scope.
    per_sample = (shape[0], *(1,) * (len(shape) - 1))
    rare = torch.rand(shape) < torch.tensor([0.0, 0.02, 0.5])[torch.randint(3, per_sample)]
    return torch.where(rare, drawn, x)


def as_channels_last(x):
    """Return x with its channels adjacent in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
