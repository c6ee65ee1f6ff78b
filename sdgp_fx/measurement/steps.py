"""Whole training steps, to be timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], Tensor]


def make_step(
    compiled: Callable[[Tensor], Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
) -> Step:
    """Return a function that takes one training step: forward, loss, backward, SGD.

    Args:
        compiled: The forward of model, compiled at its first call.
        dtype: Of autocast; with float32 there is none.

    Returns:
        A function that returns the loss.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
