"""The operator sdgp::record: hand numbers from a running compiled graph to Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Receiver(Protocol):
    """Take what graphs record."""

    def receive(self, layers: str, numbers: Tensor) -> None:
        """Take the numbers of one backward, on whatever thread runs it.

        Args:
            layers: As the graph gave it to the operator.
            numbers: (count,), on the device that computed them; they may not be there yet.
        """


# By key. A receiver that is gone isn't called any more; graphs that record for it run on.
receivers: WeakValueDictionary[str, Receiver] = WeakValueDictionary()


# It only reads. That it writes is declared so that no compiler leaves out a call whose result
# nobody uses; and a captured CUDA graph, which would replay no Python, must not contain it.
@torch.library.custom_op(
    "sdgp::record", mutates_args={"numbers"}, tags=(torch.Tag.cudagraph_unsafe,)
)
def record(numbers: Sequence[Tensor], key: str, layers: str) -> None:
    """Hand numbers to a receiver, if there still is one, without waiting for the device.

    Args:
        numbers: Of shape (), one dtype and device. The receiver gets a stacked copy.
        key: The receiver's key in `receivers`.
        layers: Names what the numbers are of, in words that the receiver understands.
    """
    receiver = receivers.get(key)
    if receiver is not None:
        receiver.receive(layers, torch.stack(list(numbers)))


RECORD = torch.ops.sdgp.record.default


@record.register_fake
def _(numbers: Sequence[Tensor], key: str, layers: str) -> None:
    pass
