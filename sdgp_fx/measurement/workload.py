"""The training step that is measured: a network, its images, and the form of the tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from .convolutions import Convolution, calls_of_convolutions
from .networks import build_network

CLASSES = 1000
DTYPES = ("bfloat16", "float16", "float32")
MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


def default_dtype(device: torch.device) -> str:
    """Return the dtype that networks are usually trained in on a device."""
    return "bfloat16" if device.type == "cuda" else "float32"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step of a timm network on images (batch, 3, size, size) of noise.

    Attributes:
        model: The network's name, with 1000 classes.
        dtype: Name of a torch dtype, of layers that are timed alone and of autocast in a step.
        memory_format: A key of MEMORY_FORMATS.
        device: Where the step runs; building and counting need no memory on it.
    """

    model: str
    batch: int
    size: int
    dtype: str = "bfloat16"
    memory_format: str = "channels_last"
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return MEMORY_FORMATS[self.memory_format]

    def facts(self, *without: str) -> dict[str, Any]:
        """Return the fields but the device and those named, for a row of a report."""
        fields = dataclasses.asdict(self)
        return {name: fields[name] for name in fields if name not in ("device", *without)}

    def build(self) -> nn.Module:
        """Build the network on the CPU, with new weights, in training mode."""
        return build_network(self.model, num_classes=CLASSES)

    def random_batch(self) -> tuple[Tensor, Tensor]:
        """Draw images of noise, in float32, and labels."""
        shape = (self.batch, 3, self.size, self.size)
        images = torch.randn(shape, device=self.device)
        labels = torch.randint(CLASSES, (self.batch,), device=self.device)
        return images.contiguous(memory_format=self.torch_memory_format), labels

    def convolution_calls(
        self, targets: Collection[str] = ("conv",)
    ) -> list[tuple[str, Convolution]]:
        """Return the convolutions of a forward, each with the name of its module, in order.

        Args:
            targets: As for `calls_of_convolutions`.

        Raises:
            ValueError: The network takes no such images.
        """
        return list(_convolution_calls(self.model, self.batch, self.size, tuple(targets)))

    def count_convolutions(self, targets: Collection[str] = ("conv",)) -> Counter[Convolution]:
        """Return the distinct convolutions, in order, with how often each occurs.

        Args:
            targets: As for `calls_of_convolutions`.

        Raises:
            ValueError: The network takes no such images.
        """
        return Counter(convolution for _, convolution in self.convolution_calls(targets))


# Building a network takes seconds, and a suite asks for one of the same many times.
@functools.cache
def _convolution_calls(
    model: str, batch: int, size: int, targets: tuple[str, ...]
) -> list[tuple[str, Convolution]]:
    images = torch.empty(batch, 3, size, size, device="meta")
    try:
        network = build_network(model, num_classes=CLASSES).to("meta")
        return calls_of_convolutions(network, images, targets=targets)
    except Exception as error:  # Networks refuse a size with whatever error they happen to meet.
        reason = first_line(error)
        raise ValueError(f"--size: {model} takes no {size}x{size} images: {reason}") from None
