"""Test the search for a network's convolutions: which are found, counted, and can be pruned."""

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs timm")

from sdgp_fx.measurement.convolutions import calls_of_convolutions
from sdgp_fx.measurement.workload import Workload


def test_names_of_layers_and_what_is_prunable():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)),
        nn.Conv2d(8, 24, 3, groups=2),
    )
    names, convolutions = zip(*calls_of_convolutions(network, torch.randn(2, 3, 9, 9)), strict=True)
    assert names == ("0", "1.1", "2")
    assert [c.needs_input_gradient for c in convolutions] == [False, True, True]
    first, depthwise, last = convolutions
    assert not any(c.is_prunable(m) for c in (first, depthwise) for m in (2, 4))
    assert [last.is_prunable(m) for m in (2, 4, 8)] == [True, True, False]
    assert str(last) == "2x8x5x5 * 24x4x3x3 in 2 groups"


def test_convolutions_of_resnet18():
    found = Workload("resnet18", 256, 224).count_convolutions()
    assert len(found) == 11
    assert sum(found.values()) == 20
    first, second, *_ = found.items()
    assert first[0].weight == (64, 3, 7, 7)
    assert first[1] == 1
    assert not first[0].needs_input_gradient
    assert second[0].input == second[0].output == (256, 64, 56, 56)
    assert second[1] == 4
    assert all(convolution.needs_input_gradient for convolution in list(found)[1:])
    # 1.8 billion multiplications and additions for an image (He et al. 2016).
    flops = sum(convolution.flops * count for convolution, count in found.items())
    assert flops / 2 / 256 == pytest.approx(1.81e9, rel=0.01)


def test_flops_of_a_transposed_convolution():
    """Each input value is multiplied by all weights of its channel."""
    network = torch.nn.ConvTranspose2d(8, 16, 2, stride=2, groups=4, bias=False)
    ((_, convolution),) = calls_of_convolutions(network, torch.randn(3, 8, 5, 5))
    assert convolution.transposed
    assert convolution.flops == 2 * (3 * 8 * 5 * 5) * (16 // 4 * 2 * 2)
