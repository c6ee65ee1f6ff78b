"""The convolutions of a network, found by running it without data."""

from __future__ import annotations

from collections import Counter

import timm
import torch

from sdgp_fx.cli.networks import check_model
from sdgp_fx.measurement.convolutions import Convolution, calls_for_images

CLASSES = 1000


def find_convolutions(model: str, batch: int, size: int) -> Counter[Convolution]:
    """The distinct convolutions of a timm network, in order, with how often each occurs.

    batch, size: the network gets images (batch, 3, size, size).
    Raises ValueError if timm has no such network, or if it takes no such images.
    """
    check_model(model, "--model")
    network = build_network(model).to("meta")
    calls = calls_for_images(network, model, batch, size)
    return Counter(convolution for _, convolution in calls)


def build_network(model: str) -> torch.nn.Module:
    """A timm network in training mode, for CLASSES classes."""
    return timm.create_model(model, num_classes=CLASSES)
