"""Test the benchmark of convolutions: what is timed under each name, and the sums."""

import dataclasses

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")

from benchmarks import convolutions
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.convolutions import calls_of_convolutions
from sdgp_fx.measurement.workload import Workload


def test_convolutions_compute_the_gradients(monkeypatch):
    """Every timed call computes what its name says, with stride, padding and groups."""
    results = {}

    def measure(functions, device, seconds, calls):
        return {name: timing.Timing(1e-6, 0, 0, 1) for name in functions}

    def back_to_back(calls, device):
        results[len(results)] = (calls[0].args, calls[0]())

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "back_to_back", back_to_back)
    network = torch.nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    ((_, convolution),) = calls_of_convolutions(network, x)
    workload = Workload("m", 2, 7, "float32")
    first = dataclasses.replace(convolution, needs_input_gradient=False)
    (row,) = convolutions.measure(workload, first, 1, False, 0.1)
    assert row["input_gradient_us"] is row["input_gradient_tflops"] is None
    assert len(results) == 2
    results.clear()
    (row,) = convolutions.measure(workload, convolution, 1, False, 0.1)
    assert row["forward_tflops"] == pytest.approx(convolution.flops / 1e-6 / 1e12)

    forward, weight_gradient, input_gradient = results.values()
    x, weight = (tensor.requires_grad_() for tensor in forward[0][:2])
    expected = torch.nn.functional.conv2d(x, weight, stride=2, padding=1, groups=2)
    torch.testing.assert_close(forward[1], expected)
    grad_output = weight_gradient[0][0]
    gx, gw = torch.autograd.grad(expected, (x, weight), grad_output)
    assert [g is None for g in weight_gradient[1]] == [True, False, True]
    assert [g is None for g in input_gradient[1]] == [False, True, True]
    torch.testing.assert_close(weight_gradient[1][1], gw)
    torch.testing.assert_close(input_gradient[1][0], gx)


def test_convolutions_sum_up_by_count():
    def row(count, forward, input_gradient, weight_gradient):
        times = {"forward_us": forward, "input_gradient_us": input_gradient}
        return {"model": "m", "count": count, **times, "weight_gradient_us": weight_gradient}

    (line,) = convolutions.headline([row(1, 1000, None, 1000), row(2, 1000, 2000, 1000)])
    assert line == (
        "m convolutions 10.00 ms: forward 30.0%, input gradient 40.0%, weight gradient 30.0%"
    )
