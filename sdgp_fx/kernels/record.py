"""The operators sdgp::step and sdgp::record: what a running compiled graph tells Python.

    forward    step = sdgp.step(key, device)
    backward   sdgp.record([...], step, key, layers)

The forward saves the step for its own backward: another forward may run before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
import torch.fx
from torch import Tensor


class Receiver(Protocol):
    """Take what graphs record.

    Attributes:
        step: What a forward that starts now is to be known by.
    """

    step: int

    def receive(self, layers: str, step: Tensor, numbers: Tensor) -> None:
        """Take the numbers of one backward, on whatever thread runs it.

        Args:
            layers: As the graph gave it to the operator.
            step: int64, of shape (): `step` as it was in the forward.
            numbers: (count,), on the device that computed them, as is step; they may not be there
                yet.
        """


# By key. A receiver that is gone isn't called any more; graphs that record for it run on.
receivers: WeakValueDictionary[str, Receiver] = WeakValueDictionary()


@torch.library.custom_op("sdgp::step", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def step(key: str, device: torch.device) -> Tensor:
    """Return the receiver's step, int64 of shape (); -1 if it is gone."""
    receiver = receivers.get(key)
    return torch.full((), -1 if receiver is None else receiver.step, device=device)


# It has none; but what has one is a part of the forward, also where no output comes from it.
STEP = torch.fx.has_side_effect(torch.ops.sdgp.step.default)


@step.register_fake
def _(key: str, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


# It only reads. That it writes is declared so that no compiler leaves out a call whose result
# nobody uses; and a captured CUDA graph, which would replay no Python, must not contain it.
@torch.library.custom_op(
    "sdgp::record", mutates_args={"numbers"}, tags=(torch.Tag.cudagraph_unsafe,)
)
def record(numbers: Sequence[Tensor], step: Tensor, key: str, layers: str) -> None:
    """Hand numbers to a receiver, if there still is one, without waiting for the device.

    Args:
        numbers: Of shape (), one dtype and device. The receiver gets a stacked copy.
        step: From the operator of that name, in the forward.
        key: The receiver's key in `receivers`.
        layers: Names what the numbers are of, in words that the receiver understands.
    """
    receiver = receivers.get(key)
    if receiver is not None:
        receiver.receive(layers, step.clone(), torch.stack(list(numbers)))


RECORD = torch.ops.sdgp.record.default


@record.register_fake
def _(numbers: Sequence[Tensor], step: Tensor, key: str, layers: str) -> None:
    pass
