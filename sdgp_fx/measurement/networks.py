"""Build timm's networks by name, without memory for their parameters if wanted."""

from __future__ import annotations

import difflib
from typing import Any
from unittest import mock

import timm
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def check_model(name: str, option: str) -> None:
    """Check that timm has a network of this name.

    Args:
        option: The option that the name was given as, for the message.

    Raises:
        ValueError: There is none; the message has names that are close.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ValueError(f"{option}: expected a network of timm, got {name!r}{hint}")


def default_input_size(name: str) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a network is made for."""
    size: tuple[int, int, int] = (timm.get_pretrained_cfg(name) or PretrainedCfg()).input_size
    return size


def build_network(name: str, size: int | tuple[int, int] | None = None, **kwargs: Any) -> nn.Module:
    """Build timm's network of this name, in training mode.

    Args:
        size: Size of the images, for a network that is built for one size.
        kwargs: For `timm.create_model`.
    """
    if size is not None:
        try:
            return timm.create_model(name, img_size=size, **kwargs)
        except TypeError:  # It has no such argument: it takes what it can.
            pass
    return timm.create_model(name, **kwargs)


class Uninitialized(TorchDispatchMode):
    """Leave parameters as torch.empty makes them: memory that is never touched takes no space.

    Small tensors are computed: networks ask for values of some while they are built.
    """

    def __enter__(self) -> Any:
        # This one draws until the values are in range, which they never will be.
        self._patch = mock.patch.object(nn.init, "_no_grad_trunc_normal_", lambda x, *_, **__: x)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = func._schema.name.endswith("_") and isinstance(args[0], Tensor)
        if in_place and args[0].numel() > 1024:
            return args[0]
        return func(*args, **(kwargs or {}))
