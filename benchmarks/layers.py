"""The convolutions of a network, found by running it without data."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Shapes and settings of a convolution, as torch.ops.aten.convolution has them.

    needs_input_gradient: in training; the first layer's input needs none.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    needs_input_gradient: bool

    @property
    def settings(self) -> tuple[Any, ...]:
        """What torch.ops.aten.convolution takes after input, weight and bias."""
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    @property
    def flops(self) -> int:
        """Of the output; as many as of the input gradient and of the weight gradient."""
        positions = self.input if self.transposed else self.output
        return 2 * math.prod(positions) * math.prod(self.weight[1:])


def find_convolutions(model: str, batch: int, size: int) -> Counter[Convolution]:
    """The distinct convolutions of a timm network, in order, with how often each occurs.

    batch, size: the network gets images (batch, 3, size, size).
    Raises ValueError if timm has no such network, or if it takes no such images.
    """
    check_model(model)
    network = build_network(model).to("meta")
    images = torch.empty(batch, 3, size, size, device="meta")
    recorder = _Recorder()
    try:
        with recorder:
            network(images)
    except Exception as error:  # Networks refuse a size with whatever error they happen to meet.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"--size: {model} takes no {size}x{size} images: {reason}") from None
    return recorder.found


def build_network(model: str) -> torch.nn.Module:
    """A timm network in training mode, for CLASSES classes."""
    return timm.create_model(model, num_classes=CLASSES)


def check_model(model: str) -> None:
    """Raise ValueError if timm has no network of this name."""
    if not timm.is_model(model):
        raise ValueError(f"--model: expected a network of timm, got {model!r}")


class _Recorder(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
            convolution = Convolution(
                input=tuple(x.shape),
                weight=tuple(weight.shape),
                output=tuple(result.shape),
                stride=tuple(stride),
                padding=tuple(padding),
                dilation=tuple(dilation),
                transposed=transposed,
                output_padding=tuple(output_padding),
                groups=groups,
                needs_input_gradient=x.requires_grad,
            )
            self.found[convolution] += 1
        return result
