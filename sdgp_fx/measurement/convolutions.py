"""The three products of a convolution in training: forward and both gradients, and their times."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from . import timing

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input_gradient", "weight_gradient"
PRODUCTS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)


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

    def is_pruned(self, m: int) -> bool:
        """Whether the backend prunes groups of m channels, m > 1, of its output's gradient."""
        return self.needs_input_gradient and self.output[1] // self.groups % m == 0

    def __str__(self) -> str:
        """Input and weight, and what is unusual of the settings."""
        text = "{} * {}".format(*("x".join(map(str, shape)) for shape in (self.input, self.weight)))
        if set(self.stride) != {1}:
            text += f" / {'x'.join(map(str, self.stride))}"
        if self.groups > 1:
            text += f" in {self.groups} groups"
        return f"{text} transposed" if self.transposed else text


def calls_of_convolutions(
    network: nn.Module, *inputs: torch.Tensor
) -> list[tuple[str, Convolution]]:
    """The convolutions of a forward pass, each with the name of its module, in order.

    The network is run; on the device "meta" that takes no time and no memory.
    """
    recorder = Recorder(network)
    with recorder:
        network(*inputs)
    return recorder.calls


def calls_for_images(
    network: nn.Module, model: str, batch: int, size: int
) -> list[tuple[str, Convolution]]:
    """Those for images (batch, 3, size, size), of a network on the device "meta".

    model: its name. Raises ValueError for images that the network does not take.
    """
    images = torch.empty(batch, 3, size, size, device="meta")
    try:
        return calls_of_convolutions(network, images)
    except Exception as error:  # Networks refuse a size with whatever error they happen to meet.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"--size: {model} takes no {size}x{size} images: {reason}") from None


def cold_operands(
    convolution: Convolution,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Random grad_output, input and weight; as many sets of them as `timing.cold` makes."""
    shapes = (convolution.output, convolution.input, convolution.weight)

    def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        grad_output, x, weight = (t.contiguous(memory_format=memory_format) for t in made)
        return grad_output, x, weight

    return timing.cold(tensors, sum(map(math.prod, shapes)) * dtype.itemsize, device)


def time_products(
    convolution: Convolution,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
    seconds: float,
) -> dict[str, timing.Timing]:
    """Times of PRODUCTS of one convolution, without a bias; no INPUT_GRADIENT if it needs none.

    Values are random, operands are not in the cache (on CUDA), and no time of Python's counts.
    seconds: about how long to measure.
    """
    operands = cold_operands(convolution, dtype, memory_format, device)

    def backward(*output_mask: bool) -> list[partial[object]]:
        return [
            partial(
                torch.ops.aten.convolution_backward,
                *(*each, None, *convolution.settings, output_mask),
            )
            for each in operands
        ]

    calls = {
        FORWARD: [
            partial(torch.ops.aten.convolution, x, weight, None, *convolution.settings)
            for _, x, weight in operands
        ],
        WEIGHT_GRADIENT: backward(False, True, False),
    }
    if convolution.needs_input_gradient:
        calls[INPUT_GRADIENT] = backward(True, False, False)
    functions = {name: timing.back_to_back(each, device) for name, each in calls.items()}
    return timing.measure(functions, device, seconds, len(operands))


class Recorder(TorchDispatchMode):
    """Records the convolutions that run, with the module of network that runs each."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[str, Convolution]] = []
        self._names = {module: name for name, module in network.named_modules()}
        self._name = ""

    def __enter__(self) -> Any:
        self._hook = register_module_forward_pre_hook(self._enter)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._name = self._names.get(module, self._name)

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
            self.calls.append((self._name, convolution))
        return result
