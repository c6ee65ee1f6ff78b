"""Train by the paper's CIFAR-10 recipe (McDanel et al. 2022, section V).

All images lie on the device as bytes. Batches are cut from them, augmented and normalised there,
in the compiled step, from a few random numbers an image that are drawn ahead of it: the same for
every setting that is compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from .resnet9 import ResNet9

MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)

BATCH = 512
EPOCHS = 150
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
FIRST_LR, PEAK_LR, PEAK_EPOCH = 5e-5, 0.5, 5
SHIFT = 2
HOLE = 4


@dataclasses.dataclass(frozen=True)
class Images:
    """Images (N, 3, 32, 32) of bytes and labels (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Random numbers of a batch's augmentation, all of shape (N,).

    Attributes:
        top, left: Of the part of the image, with SHIFT pixels of black around it, that is taken.
        mirrored: Whether it is mirrored.
        row, column: The centre of the square that is cut out.
    """

    top: Tensor
    left: Tensor
    mirrored: Tensor
    row: Tensor
    column: Tensor


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Recipe that all runs of a comparison share; the defaults are the paper's.

    Attributes:
        lr: The peak's.
        width: Of ResNet9.
        dtype: Of autocast; float32 is without. float16 has a gradient scaler.
        compiler: "inductor" or "aot_eager", of the dense network and inside of sdgp.
    """

    epochs: int = EPOCHS
    batch: int = BATCH
    lr: float = PEAK_LR
    width: int = 128
    dtype: str = "float16"
    compiler: str = "inductor"
    label_smoothing: ClassVar[float] = LABEL_SMOOTHING


@dataclasses.dataclass
class Run:
    """Results of a training run, by epoch.

    Attributes:
        seconds: Of training, with compilation in the first.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def load(root: Path, device: torch.device) -> tuple[Images, Images]:
    """Load CIFAR-10's training and test images, as torchvision stores them under root.

    Raises:
        ValueError: They are not there.
    """
    try:
        parts = [CIFAR10(root, train=train, download=False) for train in (True, False)]
    except RuntimeError:
        raise ValueError(
            f"--root: expected the folder that has {CIFAR10.base_folder} in it, as "
            f"torchvision.datasets.CIFAR10({str(root)!r}, download=True) makes it, got {root}"
        ) from None
    train, test = (
        Images(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous().to(device),
            torch.tensor(part.targets, device=device),
        )
        for part in parts
    )
    return train, test


def fraction_of(data: Images, fraction: float) -> Images:
    """Return the first images, that share of them; CIFAR-10's are in no order."""
    count = math.ceil(len(data) * fraction)
    return Images(data.images[:count], data.labels[:count])


def batches(data: Images, size: int, generator: torch.Generator) -> Iterator[tuple[Images, Draw]]:
    """Yield an epoch in a new order, without what is left over after the last whole batch."""
    device = data.labels.device
    order = torch.randperm(len(data), generator=generator)
    for chosen in order[: len(data) // size * size].view(-1, size):
        numbers = [
            torch.randint(high, (size,), generator=generator)
            for high in (2 * SHIFT + 1, 2 * SHIFT + 1, 2, *data.images.shape[2:])
        ]
        here = chosen.to(device)
        draw = Draw(*(number.to(device) for number in numbers))
        yield Images(data.images[here], data.labels[here]), draw


def augment(images: Tensor, draw: Draw) -> Tensor:
    """Shift and mirror the images of a batch and cut a square out; floats (N, 3, H, W)."""
    count, _, height, width = images.shape
    rows = draw.top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = torch.where(draw.mirrored[:, None] > 0, width - 1 - columns, columns)
    columns = draw.left[:, None] + columns
    padded = F.pad(normalize(images), (SHIFT,) * 4)
    image = torch.arange(count, device=images.device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    hole = _near(draw.row, height)[:, :, None] & _near(draw.column, width)[:, None, :]
    return torch.where(hole[..., None], 0.0, shifted).permute(0, 3, 1, 2)


def _near(centre: Tensor, size: int) -> Tensor:
    distance = torch.arange(size, device=centre.device) - centre[:, None]
    return (distance >= -HOLE // 2) & (distance < HOLE // 2)


def normalize(images: Tensor) -> Tensor:
    """Convert bytes (N, 3, H, W) to floats with mean 0 and standard deviation 1, by channel."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images.float() - mean) / std


def learning_rate(epoch: float, recipe: Recipe) -> float:
    """Return the learning rate: up to the peak at epoch 5, and down to 0 at the end.

    With fewer than 150 epochs the peak comes after the same share of them.
    """
    peak = PEAK_EPOCH / EPOCHS
    return recipe.lr * up_and_down(epoch / recipe.epochs, peak, FIRST_LR / PEAK_LR)


def up_and_down(done: float, peak: float, first: float) -> float:
    """Go in a line from first up to 1 and down to 0; done and peak are shares of the training."""
    return first + (1 - first) * done / peak if done < peak else (1 - done) / (1 - peak)


def train(
    recipe: Recipe,
    compile: Mapping[str, Any],
    data: Images,
    test: Images,
    seed: int,
    watch: Callable[[int, nn.Module], None] = lambda done, network: None,
    make: Callable[[int], nn.Module] = ResNet9,
    dense_last: float = 0.0,
) -> Run:
    """Train a network from seed and test it after each epoch.

    Args:
        compile: Arguments for torch.compile.
        watch: Called ahead of each epoch and at the end, with the number of epochs that are done
            and the network.
        make: Makes the network, of the recipe's width.
        dense_last: Share of the steps, the last ones, that the recipe's compiler alone compiles.

    Raises:
        ValueError: There is no whole batch.
    """
    if len(data) < recipe.batch:
        raise ValueError(f"--batch: expected at most {len(data)}, the images, got {recipe.batch}")
    device = data.labels.device
    torch.compiler.reset()  # Or all settings would count against Dynamo's recompile_limit.
    torch.manual_seed(seed)
    network = make(recipe.width).to(device)
    network = network.to(memory_format=torch.channels_last)
    pruned = compile_loss(network, recipe, compile)
    dense = compile_loss(network, recipe, {"backend": recipe.compiler})
    optimizer = make_optimizer(network)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.dtype == "float16")
    generator = torch.Generator().manual_seed(seed)
    run, total = Run(), len(data) // recipe.batch
    for epoch in range(recipe.epochs):
        watch(epoch, network)
        network.train()
        start, losses = perf_counter(), []
        for i, (batch, draw) in enumerate(batches(data, recipe.batch, generator)):
            now = epoch + i / total
            loss_of = pruned if now < recipe.epochs * (1 - dense_last) else dense
            loss = loss_of(batch.images, batch.labels, draw)
            update(loss, optimizer, scaler, learning_rate(now, recipe))
            losses.append(loss.detach())
        run.losses.append(torch.stack(losses).mean().item())
        run.seconds.append(perf_counter() - start)
        run.accuracies.append(accuracy(network, test, recipe))
    watch(recipe.epochs, network)
    return run


def compile_loss(
    network: nn.Module, recipe: Recipe, compile: Mapping[str, Any]
) -> Callable[[Tensor, Tensor, Draw], Tensor]:
    """Return the compiled loss of images of bytes, labels and their augmentation.

    Args:
        compile: Arguments for torch.compile.
    """
    device = next(network.parameters()).device

    @torch.compile(fullgraph=True, **compile)
    def loss_of(images: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        inputs = augment(images, draw).contiguous(memory_format=torch.channels_last)
        with autocast(device, recipe.dtype):
            logits = network(inputs)
        return F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)

    return loss_of


def update(
    loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float
) -> None:
    """Take a step of the optimizer along the loss's gradient."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def make_optimizer(network: nn.Module, weight_decay: float = WEIGHT_DECAY) -> torch.optim.Optimizer:
    """Make an SGD optimizer with momentum, and weight decay of all but BatchNorm's parameters."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in network.modules():
        group = free if isinstance(module, nn.BatchNorm2d) else decayed
        group += module.parameters(recurse=False)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free},
    ]
    return torch.optim.SGD(groups, lr=FIRST_LR, momentum=MOMENTUM, weight_decay=0, fused=True)


@torch.no_grad()
def accuracy(network: nn.Module, test: Images, recipe: Recipe) -> float:
    """Return the share of test images that are classified right, with mirror images' help."""
    network.eval()
    right = torch.zeros((), dtype=torch.int64, device=test.labels.device)
    parts = zip(test.images.split(recipe.batch), test.labels.split(recipe.batch), strict=True)
    for images, labels in parts:
        inputs = normalize(images).contiguous(memory_format=torch.channels_last)
        with autocast(inputs.device, recipe.dtype):
            logits = network(inputs) + network(inputs.flip(3))
        right += (logits.argmax(1) == labels).sum()
    return right.item() / len(test)


def autocast(device: torch.device, name: str) -> torch.autocast:
    """Return autocast to the dtype of this name; with float32 there is none."""
    dtype = getattr(torch, name)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
