"""Find the convolutions of a network, and time their three products in training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..passes.convolutions import convolution_macs
from ..passes.decisions import has_whole_groups
from . import timing

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input_gradient", "weight_gradient"
PRODUCTS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Shapes and settings of a convolution, as torch.ops.aten.convolution has them.

    A linear layer is a convolution of (rows, C_in) without positions.

    Attributes:
        needs_input_gradient: Whether training computes it; the first layer's input needs none.
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
        """Arguments of torch.ops.aten.convolution after input, weight and bias."""
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
        """Operations of the forward; each gradient takes as many."""
        return 2 * int(convolution_macs(self.input, self.weight, self.output, self.transposed))

    def is_prunable(self, m: int) -> bool:
        """Whether the backend can prune its output's gradient in groups of m channels, m > 1."""
        return self.needs_input_gradient and has_whole_groups(self.output[1], self.groups, m)

    def __str__(self) -> str:
        """Describe input and weight, and settings that are not the usual ones."""
        text = "{} * {}".format(*("x".join(map(str, shape)) for shape in (self.input, self.weight)))
        if set(self.stride) != {1}:
            text += f" / {'x'.join(map(str, self.stride))}"
        if self.groups > 1:
            text += f" in {self.groups} groups"
        return f"{text} transposed" if self.transposed else text


def calls_of_convolutions(
    network: nn.Module, *inputs: torch.Tensor, targets: Collection[str] = ("conv",)
) -> list[tuple[str, Convolution]]:
    """Run a network, and return its convolutions with the names of their modules, in order.

    On the device "meta" that takes no time and no memory.

    Args:
        targets: "conv", "linear" or both, as in `SDGPConfig`: which layers are returned.
    """
    recorder = Recorder(network)
    with recorder:
        network(*inputs)
    return [
        (name, layer)
        for name, layer in recorder.calls
        if ("conv" if layer.stride else "linear") in targets
    ]


def cold_operands(
    convolution: Convolution,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Draw grad_output, input and weight; as many sets of them as `timing.cold` makes."""
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
    """Time the products of one convolution without a bias.

    Values are random, operands are not in the cache (on CUDA), and no time of Python's counts.

    Args:
        seconds: About how long to measure.

    Returns:
        A time for each of PRODUCTS, but INPUT_GRADIENT where none is needed.
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
    """Record the layers that run, with the module of network that runs each.

    Attributes:
        calls: The modules' names and the layers, in order.
    """

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
            x, weight, _, *settings = args
        elif func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            x, weight = args[-2], args[-1].mT
            settings = [(), (), (), False, (), 1]
        else:
            return result
        stride, padding, dilation, transposed, output_padding, groups = settings
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
