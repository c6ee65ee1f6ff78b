"""The operator sdgp::record: numbers of a compiled graph, handed to Python while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Receiver(Protocol):
    """Of what graphs record."""

    def receive(self, layers: str, numbers: Tensor) -> None:
        """Called at the time of the backward, from whatever thread runs it."""


receivers: WeakValueDictionary[str, Receiver] = WeakValueDictionary()


# It only reads. That it writes is declared so that no compiler leaves out a call whose result
# nobody uses; and a captured CUDA graph, which would replay no Python, must not contain it.
@torch.library.custom_op(
    "sdgp::record", mutates_args={"numbers"}, tags=(torch.Tag.cudagraph_unsafe,)
)
def record(numbers: Sequence[Tensor], key: str, layers: str) -> None:
    """Hand numbers to the receiver of this key, if there still is one.

    numbers: of shape (), one dtype and device; the receiver gets a stacked copy, without waiting
        for the device.
    layers: says what they are of.
    """
    receiver = receivers.get(key)
    if receiver is not None:
        receiver.receive(layers, torch.stack(list(numbers)))


RECORD = torch.ops.sdgp.record.default


@record.register_fake
def _(numbers: Sequence[Tensor], key: str, layers: str) -> None:
    pass
