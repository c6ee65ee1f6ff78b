"""Test the benchmark of products: what is timed under each name, what it is compared with, sums."""

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs timm")

from benchmarks import products
from benchmarks.harness.input_gradients import dense_input_grad
from sdgp_fx.kernels import reference
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.convolutions import calls_of_convolutions
from sdgp_fx.measurement.workload import Workload

LAYERS = {
    "strided and grouped": (
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False),
        (2, 8, 7, 7),
    ),
    "transposed": (nn.ConvTranspose2d(8, 16, 3, stride=2, bias=False), (2, 8, 5, 5)),
    "linear": (nn.Linear(8, 16), (5, 8)),
}


def convolution_of(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape, requires_grad=True)
    ((_, convolution),) = calls_of_convolutions(layer, x, targets=("conv", "linear"))
    return convolution


@pytest.mark.parametrize("name", LAYERS)
def test_computes_what_it_names(name, monkeypatch):
    made = {}

    def sample(functions, device, seconds):
        made.update({name: function() for name, function in functions.items()})
        return {name: [2.0, 3.0] if name == "dense" else [1.0, 3.0] for name in functions}

    monkeypatch.setattr(timing, "sample", sample)
    monkeypatch.setattr(
        timing, "back_to_back", lambda calls, device: lambda: (calls[0].args, calls[0]())
    )
    layer, workload = convolution_of(name), Workload("m", 2, 7, "float32")
    rows = products.measure(workload, layer, 3, [(2, 4), (1, 8)], "magnitude", 0.1)
    assert [*made] == ["dense", (2, 4), (1, 8)]
    (_, grad_output, x, weight), dense = made["dense"]
    for pattern in ((2, 4), (1, 8)):
        pruned = reference.prune_nm(grad_output, None, *pattern, "magnitude", "group")
        expected = dense_input_grad(layer, pruned, x, weight)
        torch.testing.assert_close(made[pattern][1], expected, rtol=1e-4, atol=1e-4)
        assert made[pattern][1].shape == dense.shape == x.shape
    assert [(row["n"], row["m"], row["count"]) for row in rows] == [(2, 4, 3), (1, 8, 3)]
    assert [row["ratio"] for row in rows] == [0.75, 0.75]  # Of rounds, not of medians.
    assert [row["dense_us"] for row in rows] == [2.5e6, 2.5e6]


def test_tells_what_the_rule_chooses():
    large = products.Convolution(
        (8, 256, 16, 16), (64, 256, 3, 3), (8, 64, 14, 14), *[(1, 1), (0, 0), (1, 1)], False,
        (0, 0), 1, True,
    )  # fmt: skip
    assert products.is_chosen(large, 1, 4, "magnitude", torch.float32)
    assert not products.is_chosen(large, 3, 4, "magnitude", torch.float32)
    assert not products.is_chosen(convolution_of("linear"), 1, 4, "magnitude", torch.float32)


def test_sums_by_count_and_choice():
    def row(count, dense, sparse, chosen):
        times = {"dense_us": dense, "sparse_us": sparse, "ratio": sparse / dense}
        return {"model": "m", "n": 2, "m": 4, "count": count, "chosen": chosen, **times}

    rows = [row(1, 1000, 2000, False), row(3, 3000, 2000, True), row(2, 1000, 500, False)]
    assert products.headline(rows) == [
        "input gradients of m 2:4: dense 12.00 ms; all pruned 0.750, as the rule chooses "
        "0.750, at best 0.667 of it; slowest that the rule chooses 0.667"
    ]


def test_other_devices_and_dtypes_are_refused(capsys):
    with pytest.raises(SystemExit):
        products.main(["--dtype", "float16"])
    assert "--dtype" in capsys.readouterr().err
