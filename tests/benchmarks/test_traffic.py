"""Test the traffic counter and its counts: a pruned gradient is written once more, nothing else."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs timm")
pytest.importorskip("triton", reason="needs Triton")

from timm.models.resnet import BasicBlock

import sdgp_fx
from benchmarks import traffic
from benchmarks.harness.input_gradients import problem_of
from sdgp_fx import SDGPConfig
from sdgp_fx.inspection.gpu_codegen import generate
from sdgp_fx.measurement.convolutions import Convolution
from sdgp_fx.measurement.workload import Workload

ROOT = Path(__file__).parents[2]
RESCALED = {"n": 2, "m": 4, "prune": "rescaled_magnitude", "rescale": "group"}

PARTS = ("", "_more", "_densenet121")
SHORT_TABLE = [("model", ""), ("layers", "d"), ("stock_launches", "d"), ("extra_launches", "d")]
BYTES = [("extra_bytes_per_pruned", ".4f")]
TABLES = {
    "README.md": [*SHORT_TABLE, *BYTES],
    "docs/benchmarks.md": [
        *SHORT_TABLE,
        *[("stock_gb", ".2f"), ("pruned_gb", ".2f")],
        *BYTES,
        ("extra_peak_per_largest", ".2f"),
    ],
}


class Net(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 32, 1, bias=bias)

    def forward(self, x):
        return self.second(self.first(x).relu()).square().mean((2, 3))


class ThreeLayers(nn.Sequential):
    """Three layers, of which the second has a sparse product on GPUs.

    Its weight is frozen, so that its input gradient is where the most memory is held.
    """

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 128, 3, bias=False),
            nn.Conv2d(128, 64, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(64, 16, 1, bias=False),
        )
        self[1].weight.requires_grad_(False)

    def forward(self, x):
        return super().forward(x).square().mean((2, 3))


def count(model, images, **options):
    """Count the backward of both compilers; return the counts with the generated code."""
    counted = {}
    for name, config in {"stock": None, "sdgp": SDGPConfig(**options)}.items():

        def inspect(graph, code, name=name):
            if graph.is_backward:
                counted[name] = traffic.Backward.count(graph, code), code

        generate(model, images, config, inspect)
    return counted


def channels_last(*shape, dtype=torch.bfloat16):
    images = torch.empty(shape, dtype=dtype, device="meta")
    return images.contiguous(memory_format=torch.channels_last)


def network(**kwargs):
    return Net(**kwargs).bfloat16().to(memory_format=torch.channels_last)


def test_counts_of_a_small_network_by_hand():
    """The gradient of second's output is 2 * output * grad.

    Its kernel reads grad, N x 32, and output; it writes the gradient and the pruned gradient.
    """
    counted = count(network(), channels_last(8, 3, 34, 34))
    (stock, _), (ours, code) = counted["stock"], counted["sdgp"]
    gradient = 8 * 32 * 32 * 32 * 2
    assert ours.pruned == [gradient]
    assert ours.unfused == []
    assert ours.launches == stock.launches
    assert ours.read == stock.read
    assert ours.written == stock.written + gradient
    # The kernel that makes the gradient reads as much as it writes, and a small tensor.
    assert stock.written >= gradient
    assert stock.read >= gradient + 8 * 32 * 2
    assert code.count("convolution_backward.default(") == 3  # weight of both, input of one


def test_an_own_kernel_is_counted():
    images = channels_last(8, 3, 34, 34)
    counted = count(network(), images, rescale="feature_map")
    (stock, _), (ours, _) = counted["stock"], counted["sdgp"]
    (gradient,) = ours.pruned
    assert ours.launches == stock.launches + 1
    assert ours.read == stock.read + gradient
    assert ours.written == stock.written + gradient
    assert ours.unfused == ["not lowered"]


def test_a_sparse_product_adds_a_launch_that_packs():
    """It reads the gradient, and writes 9/16 of it with a position of zeros on each side.

    The last layer is not covered: its pruned gradient is written with its zeros.
    """
    model = ThreeLayers().bfloat16().to(memory_format=torch.channels_last)
    counted = count(model, channels_last(8, 3, 34, 34), product="sparse")
    (stock, _), (ours, code) = counted["stock"], counted["sdgp"]
    gradient, last = 8 * 64 * 32 * 32 * 2, 8 * 16 * 32 * 32 * 2
    packed = 8 * 64 * 34 * 34 * 2 * 9 // 16
    assert sorted(ours.pruned) == [last, gradient]
    assert ours.packed == [packed]
    assert ours.launches == stock.launches + 1
    assert ours.kernels == stock.kernels
    assert ours.read == stock.read + gradient
    assert ours.written == stock.written + last + packed
    assert code.count("sdgp.pruned_input_grad.default(") == 1
    # Of the weights of the first and the last layer, and of the last one's input.
    assert code.count("convolution_backward.default(") == 3
    # Weights, and what is left of the last layer, are small.
    assert abs(ours.peak - (gradient + 2 * gradient + packed)) < gradient // 4


def test_the_copies_of_a_sparse_product_are_counted():
    """It computes in channels-last memory; the channels of a 1x1 weight are adjacent already."""
    shapes = {"output": (2, 64, 8, 8), "weight": (64, 32, 1, 1), "input": (2, 32, 8, 8)}
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "output_padding": (0, 0)}
    layer = Convolution(**shapes, **geometry, transposed=False, groups=1, needs_input_gradient=True)
    grad_output, weight = (
        torch.empty(shapes[name], dtype=torch.bfloat16, device="meta")
        for name in ("output", "weight")
    )
    gradient, result = grad_output.nbytes, grad_output.nbytes // 2
    for format_, copied in {
        torch.channels_last: [],
        torch.contiguous_format: [gradient, result],
    }.items():
        problem = problem_of(
            layer, grad_output.contiguous(memory_format=format_), weight, 2, 4, "magnitude"
        )
        assert traffic.Packing.of(problem) == (gradient, gradient * 9 // 16, copied)


@pytest.mark.slow
def test_a_residual_network_writes_the_pruned_gradients_and_no_more(monkeypatch):
    """A launch, a transposing copy, or a second read of a gradient more would show here."""

    def build(self):
        """Build the first two blocks of resnet18 that differ, and what is around them."""
        shortcut = nn.Sequential(nn.Conv2d(64, 128, 1, stride=2, bias=False), nn.BatchNorm2d(128))
        return nn.Sequential(
            *(nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.MaxPool2d(3, 2, 1), BasicBlock(64, 64)),
            BasicBlock(64, 128, stride=2, downsample=shortcut),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1000)),
        )

    monkeypatch.setattr(Workload, "build", build)
    (row,) = traffic.compare(Workload("resnet18", 256, 224), SDGPConfig(**RESCALED))
    assert row["layers"] == 5
    assert row["extra_launches"] == row["extra_kernels"] == 0
    assert row["unfused"] == {}
    assert row["extra_read_gb"] == 0
    assert 1 <= row["extra_bytes_per_pruned"] <= 1.02
    assert row["extra_saved_bytes"] == 0
    assert row["extra_peak_per_largest"] <= 1


def test_inductors_own_layout_optimisation_brings_no_copy():
    """It makes the convolutions of an NCHW network channels-last, gradients too."""
    images = torch.empty(8, 3, 34, 34, dtype=torch.bfloat16, device="meta")
    counted = count(Net().bfloat16(), images)
    (stock, _), (ours, code) = counted["stock"], counted["sdgp"]
    assert "(32768, 1, 1024, 32)" in code  # The gradient's strides.
    assert ours.unfused == []
    assert ours.launches <= stock.launches
    assert ours.read <= stock.read
    assert ours.written <= stock.written + ours.pruned[0]


def test_the_documentation_has_these_figures():
    """The documentation has the figures in the repository, in the order of the tables."""
    files = [ROOT / "benchmarks" / "results" / f"traffic{part}.json" for part in PARTS]
    counted = [row for file in files for row in json.loads(file.read_text())["rows"]]
    assert all(row.items() >= RESCALED.items() for row in counted)
    for page, columns in TABLES.items():
        cells = [[format(row[name], form) for name, form in columns] for row in counted]
        table = "".join(f"| {' | '.join(row)} |\n" for row in cells)
        assert f"|\n{table}\n" in (ROOT / page).read_text()


def test_the_documentation_has_the_figures_of_sparse_products():
    results = ROOT / "benchmarks" / "results"
    rows = json.loads((results / "traffic_sparse.json").read_text())["rows"]
    stock = json.loads((results / "traffic.json").read_text())["rows"]
    assert [row["stock_gb"] for row in rows] == [row["stock_gb"] for row in stock[: len(rows)]]
    lines = [
        f"| {row['model']} | {row['sparse_layers']} of {row['layers']} | {row['extra_launches']} "
        f"| {row['extra_read_gb']:.2f} | {sum(row['sdgp']['packed']) / 1e9:.2f} "
        f"| {row['extra_written_gb']:.2f} | {row['extra_bytes_per_pruned']:.4f} "
        f"| {row['extra_peak_per_largest']:.2f} |\n"
        for row in rows
    ]
    assert f"|\n{''.join(lines)}\n" in (ROOT / "docs" / "benchmarks.md").read_text()


def test_a_recorded_step_reads_both_gradients_again(monkeypatch):
    monkeypatch.setattr(Workload, "build", lambda self: Net())
    workload, config = Workload("resnet18", 8, 34), SDGPConfig(**RESCALED)
    (plain,) = traffic.compare(workload, config)
    torch._dynamo.reset()
    (recorded,) = traffic.compare(workload, config, monitor=True)
    read = recorded["sdgp"]["read"] - plain["sdgp"]["read"]
    assert plain["extra_read_gb"] == 0
    assert read >= 2 * plain["pruned_bytes"]
    assert recorded["extra_launches"] > plain["extra_launches"]


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Workload, "build", lambda self: ThreeLayers())
    out = tmp_path / "out.json"
    tiny = ["--model", "test_resnet", "--batch", "4", "--size", "64"]
    options = ["--prune", "random", "--product", "sparse", "--monitor"]
    assert traffic.main([*tiny, *options, "--out", str(out)]) == 0
    saved = json.loads(out.read_text())
    (row,) = saved["rows"]
    assert (row["model"], row["prune"]) == ("test_resnet", "random")
    assert row["stock"]["launches"] + row["extra_launches"] == row["sdgp"]["launches"]
    assert sum(row["sdgp"]["pruned"]) == row["pruned_bytes"]
    assert (row["layers"], row["sparse_layers"]) == (2, 1)
    assert "test_resnet: 1 of 2 layers multiplied sparsely" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--model", "resnet_none", "timm"), ("--m", "3", "power of two"), ("--prune", "x", "random")],
)
def test_errors_are_of_one_line(capsys, option, value, message):
    with pytest.raises(SystemExit) as error:
        traffic.main([option, value])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_process_knows_again_that_there_is_no_gpu():
    before = torch.cuda.is_available()
    count(network(), channels_last(2, 3, 34, 34))
    assert torch.cuda.is_available() == before
    layer = torch.compile(nn.Conv2d(3, 8, 3), backend=sdgp_fx.sdgp)
    layer(torch.randn(2, 3, 9, 9)).sin().sum().backward()
