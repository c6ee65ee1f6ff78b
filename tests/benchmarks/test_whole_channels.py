"""Test whole channels: what is timed under each name, which layers the rule chooses, the sums."""

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")

from benchmarks import whole_channels
from sdgp_fx.kernels.channels import select_channels
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.convolutions import calls_of_convolutions
from sdgp_fx.measurement.workload import Workload


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_channels_computes_what_it_names(transposed, monkeypatch):
    """Check the dense, pruned and smaller products of a layer with stride, padding and groups."""
    made = []

    def sample(functions, device, seconds):
        made.extend((name, *function()) for name, function in functions.items())
        return {name: [1e-3, 2e-3, 3e-3] for name in functions}

    def back_to_back(calls, device):
        return lambda: (calls[0].args, calls[0]())

    monkeypatch.setattr(timing, "sample", sample)
    monkeypatch.setattr(timing, "back_to_back", back_to_back)
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    network = kind(8, 16, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    ((_, convolution),) = calls_of_convolutions(network, x)
    settings = ([(2, 4), (1, 8)], "magnitude", "aot_eager", False, 0.1)
    rows = whole_channels.measure(Workload("m", 2, 7, "float32"), convolution, 3, *settings)

    names = ["dense", ("whole", 2, 4), ("product", 2, 4), ("whole", 1, 8), ("product", 1, 8)]
    assert [name for name, *_ in made] == names
    for name, (grad_output, x, weight), gradient in made:
        prune, n, m = (None, 1, 1) if name == "dense" else name
        if prune == "whole":
            norms = grad_output.abs().sum((0, 2, 3))
            index, _ = select_channels(norms, n, m, "magnitude")
            dropped = torch.ones(16, dtype=torch.bool).index_fill(0, index, False)
            grad_output = grad_output.masked_fill(dropped.view(-1, 1, 1), 0)
        elif prune == "product":
            assert grad_output.shape[1] == 16 * n // m
        operands = grad_output, x, weight, None, *convolution.settings, [True, False, False]
        expected = torch.ops.aten.convolution_backward(*operands)[0]
        torch.testing.assert_close(gradient, expected)
    assert [(row["n"], row["m"], row["count"], row["chosen"]) for row in rows] == [
        (2, 4, 3, False),
        (1, 8, 3, False),
    ]
    assert [row["ratio"] for row in rows] == [1, 1]


def test_whole_channels_tells_which_layers_the_rule_chooses(monkeypatch):
    monkeypatch.setattr(timing, "back_to_back", lambda calls, device: None)
    monkeypatch.setattr(timing, "sample", lambda functions, *_: dict.fromkeys(functions, [1.0] * 2))
    workload = Workload("resnet18", 16, 128, "float32")
    settings = ([(2, 4)], "magnitude", "aot_eager", False, 0.1)
    wide, strided = "16x256x8x8 * 256x256x3x3", "16x64x32x32 * 128x64x1x1 / 2x2"
    chosen = {
        row["convolution"]: row["chosen"]
        for convolution, count in workload.count_convolutions().items()
        if str(convolution) in (wide, strided)
        for row in whole_channels.measure(workload, convolution, count, *settings)
    }
    assert chosen == {wide: True, strided: False}


def test_whole_channels_sum_up_by_count_and_choice():
    def row(count, dense, whole, product, chosen):
        times = {"dense_us": dense, "whole_us": whole, "product_us": product}
        return {"model": "m", "n": 2, "m": 4, "count": count, "chosen": chosen, **times}

    rows = [row(1, 1000, 2000, 500, False), row(3, 3000, 2000, 1000, True)]
    assert whole_channels.headline([*rows, row(2, 1000, 500, 500, False)]) == [
        "input gradients of m 2:4: dense 12.00 ms; all pruned 0.750, as the rule chooses 0.750, "
        "at best 0.667, products alone 0.375 of it"
    ]
