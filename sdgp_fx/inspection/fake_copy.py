"""Copy a model and its inputs with tensors that have shapes and no values."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode


def fake_copy(things: tuple[nn.Module, Any, Any], mode: FakeTensorMode) -> tuple[Any, Any, Any]:
    """Copy a model and its inputs together, whatever objects their tensors are in.

    A tensor of one element keeps its value, so that a length in a buffer is what it is. What an
    attribute of a module holds and what can't be copied, as a lock, is shared with the original.

    Args:
        things: The model, its args and its kwargs.
        mode: Of the copy's tensors.
    """
    memo: dict[int, Any] = {}
    with FakeCopyMode(cast(Any, _Converter(mode))):
        for module in reversed(list(things[0].modules())):
            for name, value in vars(module).items():
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                try:
                    copy.deepcopy(value, memo)
                except (TypeError, copy.Error):
                    memo[id(value)] = value
        return copy.deepcopy(things, memo)


class _Converter:
    """Make fake tensors of real ones, as a `FakeCopyMode` wants them made."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode

    def from_tensor(self, tensor: Tensor, **options: Any) -> Tensor:
        has_value = tensor.numel() == 1 and type(tensor) is Tensor and not tensor.is_meta
        if has_value and not tensor.requires_grad:
            value = tensor.detach().clone()
            return self.mode.fake_tensor_converter.from_real_tensor(
                self.mode, value, make_constant=True
            )
        fake = self.mode.from_tensor(tensor, **options)
        if not fake.is_inference():
            return fake
        # Autograd refuses tensors made in inference mode.
        with self.mode:
            return torch.empty_strided(
                fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device
            )
