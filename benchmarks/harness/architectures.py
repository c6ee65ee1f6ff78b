"""Build all architectures of timm and torchvision, without memory for their parameters."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_leaves

from sdgp_fx.measurement.networks import Uninitialized, build_network

BATCH = 2  # Batch norm of one value per channel has no variance.
SIZES = (32, 64, 96, 112, 128, 160, 192, 224, 256, 288, 384, 448, 512)
FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network of timm or torchvision.

    Attributes:
        library: "timm" or "torchvision".
        name: Its name there.
        family: The library's module that defines it.
    """

    library: str
    name: str
    family: str

    @property
    def full_name(self) -> str:
        """The name, with the library if that is not timm."""
        return self.name if self.library == "timm" else f"{self.library}/{self.name}"

    def build(self, size: int | None = None) -> nn.Module:
        """Build the network, in training mode.

        Args:
            size: Size of the images, for a network that is built for one size.
        """
        if self.library == "torchvision":
            parameters = inspect.signature(torchvision.models.get_model_builder(self.name))
            weights = {"weights", "weights_backbone"} & set(parameters.parameters)
            network = torchvision.models.get_model(self.name, **dict.fromkeys(weights))
        else:
            network = build_network(self.name, size)
        return network.train()

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it is made for."""
        config = timm.get_pretrained_cfg(self.name) if self.library == "timm" else None
        return config.input_size if config is not None else (3, 512, 512)

    def sizes(self) -> list[int]:
        """List sizes of images to try, ascending; the last is the network's own."""
        own = self.input_size[-1]
        return [*(size for size in SIZES if size < own), own]

    def inputs(self, size: int) -> tuple[Any, ...]:
        """Draw the inputs of a training step's forward."""
        images = torch.randn(BATCH, self.input_size[0], size, size)
        kind = self.family.partition(".")[0] if self.library == "torchvision" else ""
        if kind == "detection":
            return list(images), [_target(size) for _ in images]
        if kind == "optical_flow":
            return images, images
        if kind == "video":
            return (images.unsqueeze(2).repeat(1, 1, FRAMES, 1, 1),)
        return (images,)


@dataclasses.dataclass
class Example:
    """A network with inputs that it takes, to be run in its context.

    Attributes:
        size: Size of the images, the smallest of those tried that the network takes.
        fake: Whether the tensors have shapes alone and no values.
    """

    network: nn.Module
    inputs: tuple[Any, ...]
    context: Callable[[], contextlib.AbstractContextManager[Any]]
    size: int
    fake: bool


def list_architectures() -> list[Architecture]:
    """List the networks of timm and torchvision."""
    found = []
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__
        found.append(Architecture("timm", name, module.removeprefix("timm.models.")))
    for name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__
        family = module.removeprefix("torchvision.models.")
        found.append(Architecture("torchvision", name, family))
    return found


def describe(architecture: Architecture) -> tuple[int, str]:
    """Return the number of a network's parameters, and a digest of its structure.

    Where the digests are equal, so are the networks for small images, but for what they are called
    and the values of their parameters.
    """
    with Uninitialized():
        try:
            network = architecture.build(SIZES[0])
        except Exception:  # It can't be built for images that small, whatever the error.
            network = architecture.build()
    digest = hashlib.sha256(repr(list(_structure(network))).encode()).hexdigest()[:16]
    return sum(parameter.numel() for parameter in network.parameters()), digest


def _structure(network: nn.Module) -> Iterator[Any]:
    """Yield all that tells one network from another, module by module."""
    bookkeeping = {*vars(nn.Module()), "default_cfg", "pretrained_cfg"}
    for name, module in network.named_modules():
        yield name, type(module)
        for key, value in vars(module).items():
            if key not in bookkeeping:
                text = str(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                yield key, re.sub(r" at 0x\w+", "", text)
        for tensors in (module.named_parameters, module.named_buffers):
            for key, tensor in tensors(recurse=False):
                yield key, tensor.shape, tensor.dtype, tensor.requires_grad


def find_example(architecture: Architecture, fake: bool) -> Example:
    """Find the smallest images of those tried that a network takes.

    Raises:
        Exception: It takes none; what the network raises for images of its own size.
    """
    make = _fake_example if fake else _real_example
    *sizes, own = architecture.sizes()
    for size in sizes:
        with contextlib.suppress(Exception):  # Whatever a network meets in images it can't take.
            return make(architecture, size)
    return make(architecture, own)


def loss(output: Any) -> torch.Tensor:
    """Sum all that a network returns, whatever its form, times random numbers."""
    tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
    sums = [(x * torch.randn_like(x)).sum() for x in tensors if x.requires_grad]
    return torch.stack(sums).sum()


def _fake_example(architecture: Architecture, size: int) -> Example:
    mode = FakeTensorMode()
    with Uninitialized():
        network = architecture.build(size)
    with FakeCopyMode(mode):
        network = copy.deepcopy(network)
    with mode:
        inputs = architecture.inputs(size)
        network(*inputs)
    return Example(network, inputs, lambda: mode, size, fake=True)


def _real_example(architecture: Architecture, size: int) -> Example:
    network, inputs = architecture.build(size), architecture.inputs(size)
    network(*inputs)
    return Example(network, inputs, contextlib.nullcontext, size, fake=False)


def _target(size: int) -> dict[str, torch.Tensor]:
    """Describe an object to find, with all that any of torchvision's detectors wants."""
    return {
        "boxes": torch.tensor([[0.0, 0.0, size / 2, size / 2]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, size, size, dtype=torch.uint8),
        "keypoints": torch.ones(1, 17, 3),
    }
