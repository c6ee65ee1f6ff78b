"""The demo's images: scikit-learn's digits and CIFAR-10, augmented and in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10

from ..arguments import refuse


@dataclasses.dataclass(frozen=True)
class Data:
    """Images as bytes, (N, C, H, W), with their labels.

    Attributes:
        mean, std: Of the training images, by channel.
        augmented: Whether training images are flipped and shifted at random.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmented: bool


def digits() -> Data:
    """Load scikit-learn's handwritten digits: 1797 images of 8x8 pixels, a fifth for tests."""
    source = load_digits()
    images = torch.from_numpy(source.images).to(torch.uint8).unsqueeze(1)
    train, test = train_test_split(
        range(len(images)), test_size=0.2, stratify=source.target, random_state=0
    )
    labels = torch.from_numpy(source.target)
    std, mean = torch.std_mean(images[train].float())
    return Data(
        name="handwritten digits",
        images=images[train],
        labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        mean=(mean.item(),),
        std=(std.item(),),
        augmented=False,
    )


def load_cifar10(root: Path | None) -> Data:
    """Load CIFAR-10 as torchvision stores it under root.

    Raises:
        argparse.ArgumentError: It is not there.
    """
    if root is None:
        refuse("--data cifar10 needs --root DIR, the folder that has cifar-10-batches-py in it")
    try:
        train, test = (CIFAR10(root, train=train, download=False) for train in (True, False))
    except RuntimeError:
        refuse(
            f"--root: {root / CIFAR10.base_folder} is missing or is not the CIFAR-10 data set; "
            f"torchvision.datasets.CIFAR10({str(root)!r}, download=True) gets it"
        )
    return Data(
        name="CIFAR-10",
        images=torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(train.targets),
        test_images=torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(),
        test_labels=torch.tensor(test.targets),
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
        augmented=True,
    )


def training_batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and labels without end, shuffled anew in each epoch.

    What is left of an epoch is dropped: a smaller batch would have the networks compiled again.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.labels), generator=generator)
        for chosen in order[: len(order) // size * size].view(-1, size):
            images = data.images[chosen]
            if data.augmented:
                images = augment(images, generator)
            yield images, data.labels[chosen]


def augment(images: Tensor, generator: torch.Generator, margin: int = 4) -> Tensor:
    """Shift each image by up to margin pixels, with black around it, and mirror half of them."""
    count, _, height, width = images.shape
    top, left = torch.randint(2 * margin + 1, (2, count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (margin,) * 4)
    image = torch.arange(count)[:, None, None]
    shifted = padded[image, :, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()


def prepare(images: Tensor, data: Data, size: int) -> Tensor:
    """Normalize images and resize them to size x size, as a network takes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    images = (images.float() - mean) / std
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
