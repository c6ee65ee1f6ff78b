"""`python -m benchmarks.paper`: the recipe's parts, runs that are done once, and the command."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.paper import cifar10, experiment
from benchmarks.paper.__main__ import EXPERIMENTS, main
from benchmarks.paper.cifar10 import Draw, Images, Recipe, Run
from benchmarks.paper.experiment import Setting
from benchmarks.paper.resnet9 import ResNet9, convolution
from benchmarks.paper.scaled import ScaledPruning
from benchmarks.paper.settings import BEYOND, FIG8, PRECISION, TABLE1
from sdgp_fx import SDGPConfig
from sdgp_fx.config import INNER_COMPILERS

from .graphs import joint_graph

TINY = Recipe(epochs=2, batch=8, lr=0.05, width=4, dtype="float32", compiler="aot_eager")


def images(count):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10)


def test_network_of_the_paper():
    sizes = []
    network = ResNet9()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, _, out: sizes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    first = [(128, 32, 32), (256, 16, 16), (256, 16, 16), (256, 16, 16), (512, 16, 16)]
    assert sizes == [*first, (512, 8, 8), (512, 8, 8), (256, 6, 6)]


def test_augmentation_by_hand():
    batch = images(3)
    draw = Draw(*map(torch.tensor, ([0, 2, 4], [2, 1, 3], [0, 1, 0], [5, 0, 31], [6, 31, 0])))
    result = cifar10.augment(batch.images, draw)
    normal = cifar10.normalize(batch.images)
    for i in range(3):
        for y in range(32):
            for x in range(32):
                across = 31 - x if draw.mirrored[i] else x
                from_y, from_x = y + int(draw.top[i]) - 2, across + int(draw.left[i]) - 2
                cut = -2 <= y - draw.row[i] < 2 and -2 <= x - draw.column[i] < 2
                outside = not (0 <= from_y < 32 and 0 <= from_x < 32)
                expected = torch.zeros(3) if cut or outside else normal[i, :, from_y, from_x]
                assert torch.equal(result[i, :, y, x], expected)


def test_learning_rate_of_the_paper():
    recipe = Recipe()
    epochs = (0, 2.5, 5, 77.5, 150)
    rates = [cifar10.learning_rate(epoch, recipe) for epoch in epochs]
    assert rates == pytest.approx([5e-5, (5e-5 + 0.5) / 2, 0.5, 0.25, 0], abs=1e-12)


def test_weight_decay_is_not_for_batch_norm():
    network = ResNet9(4)
    decayed, free = cifar10.make_optimizer(network).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(network.parameters()))


def test_batches_follow_the_seed_alone():
    def epoch(seed):
        torch.rand(1)  # The default generator, which dropout or a pruning function draws from.
        return list(cifar10.batches(images(20), 8, torch.Generator().manual_seed(seed)))

    for (batch, draw), (same, same_draw) in zip(epoch(1), epoch(1), strict=True):
        assert torch.equal(batch.images, same.images)
        assert torch.equal(draw.top, same_draw.top)
    assert len(epoch(1)) == 2
    assert not torch.equal(epoch(1)[0][0].images, epoch(2)[0][0].images)


class Small(nn.Sequential):
    """In the place of ResNet9: the gradient of the second convolution is pruned."""

    def __init__(self, width):
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(convolution(3, width), convolution(width, 12), pool, nn.Flatten())


def test_training_dense_and_pruned(monkeypatch):
    monkeypatch.setattr(cifar10, "ResNet9", Small)
    # More settings are trained in a process than a step is compiled for.
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    data = images(16)
    pruned = Setting("pruned", SDGPConfig(prune="random"))
    settings = (Setting("dense"), pruned, pruned, replace(pruned, scale=2.0))
    dense, pruned, again, scaled = (
        cifar10.train(TINY, setting.compile("aot_eager"), data, data, 0) for setting in settings
    )
    assert pruned == replace(again, seconds=pruned.seconds)
    for other, run in ((dense, pruned), (pruned, scaled), (dense, scaled)):
        assert other.losses[1] != run.losses[1]
        assert other.losses[1] == pytest.approx(run.losses[1], rel=0.1)
    assert len(dense.accuracies) == 2


@pytest.mark.parametrize("compiler", INNER_COMPILERS)
def test_pruned_gradients_times_two(compiler):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1))
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def gradients(scale):
        torch.manual_seed(0)
        torch.compiler.reset()
        setting = Setting("random", SDGPConfig(prune="random"), scale=scale)
        compiled = torch.compile(network, **setting.compile(compiler))
        return torch.autograd.grad(compiled(images).sum(), list(network.parameters()))

    first, *_, last = gradients(1.0)
    first_scaled, *_, last_scaled = gradients(2.0)
    assert torch.equal(first_scaled, 2 * first)
    assert torch.equal(last_scaled, last)
    assert first.any()


def test_a_pass_that_runs_twice_scales_once():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1))
    graph = joint_graph(network, torch.zeros(2, 3, 4, 4)).graph
    rewrite = ScaledPruning(SDGPConfig(prune="random"), 2.0)
    rewrite(graph)
    once = str(graph)
    rewrite(graph)
    assert str(graph) == once
    assert once.count("aten.mul.Tensor") == once.count("sdgp.prune_nm") == 1


def test_too_few_images():
    with pytest.raises(ValueError, match="--batch: expected at most 4"):
        cifar10.train(TINY, {}, images(4), images(4), 0)


def test_the_environment_is_no_setting(monkeypatch):
    monkeypatch.setenv("SDGP_N", "1")
    options = Setting("magnitude", SDGPConfig(prune="magnitude")).compile("inductor")["options"]
    config, _ = SDGPConfig.from_options(options)
    assert (config.n, config.m, config.prune) == (2, 4, "magnitude")


@pytest.fixture
def trained(monkeypatch):
    """What training is asked for; every run has its seed and setting in its accuracy."""
    calls = []

    def train(recipe, compile, data, test, seed, begin):
        for epoch in range(recipe.epochs):
            begin(epoch)
        calls.append((compile, recipe.dtype, seed))
        value = 0.5 + 0.01 * seed + (0.001 if "options" not in compile else 0)
        return Run([2.0, 1.0], [0.1, value], [1.0, 1.0])

    monkeypatch.setattr(experiment, "train", train)
    return calls


def in_float32(settings):
    return [replace(setting, dtype="float32") for setting in settings]


def test_runs_are_done_once(trained, tmp_path):
    path = tmp_path / "runs.json"
    arguments = (TINY, images(10), images(10), path)
    settings = in_float32(TABLE1)
    experiment.run(settings[:2], 1, *arguments)
    report = experiment.run(settings, 2, *arguments)
    asked = [(s.compile("aot_eager"), "float32", seed) for seed in range(2) for s in settings]
    assert trained == asked
    assert len(report.rows) == len(json.loads(path.read_text())["rows"]) == 8
    other = replace(TINY, epochs=3)
    with pytest.raises(ValueError, match="--out: expected a new file, or one of runs with"):
        experiment.run(settings, 2, other, images(10), images(10), path)


def test_runs_are_shared_by_what_was_trained(trained, tmp_path):
    arguments = (TINY, images(10), images(10), tmp_path / "runs.json")
    experiment.run(in_float32(TABLE1), 1, *arguments)
    experiment.run(in_float32(FIG8), 1, *arguments)
    # Dense and 2:4 are there; what is drawn at random is another setting when it is scaled.
    assert len(trained) == len(TABLE1) + len(FIG8) - 2
    experiment.run(in_float32(BEYOND), 1, *arguments)
    assert len(trained) == len(TABLE1) + len(FIG8) - 2 + 4
    experiment.run(PRECISION, 1, *arguments)
    assert [dtype for _, dtype, _ in trained[-8:]] == ["float16"] * 4 + ["bfloat16"] * 4


def test_progress_has_an_estimate(trained, capsys):
    experiment.run(in_float32(TABLE1[:2]), 1, TINY, images(10), images(10), None)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "1/4 dense, seed 0, epoch 1"
    assert last == "4/4 random, seed 0, epoch 2, about 0 min left"
    assert experiment.time_left(60, 3, 9) == ", about 2 min left"


def test_differences_are_taken_seed_by_seed(trained, capsys):
    settings = (Setting("dense"), Setting("other", SDGPConfig(n=1), 95.2))
    rows = experiment.run(settings, 3, TINY, images(10), images(10), None).rows
    experiment.show(rows, settings)
    *_, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["other", "3", "51.00", "1.00", "-0.10", "0.00", "95.2"]


def test_one_seed_has_no_spread():
    assert math.isnan(experiment.deviation([1.0]))
    assert experiment.percent(math.nan) == "-"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_command(name, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar10, "load", lambda root, device: (images(10), images(10)))
    picture, out = tmp_path / "picture.png", tmp_path / "runs.json"
    arguments = ["--root", str(tmp_path), "--seeds", "2", "--fraction", "0.5", "--device", "cpu"]
    assert main([name, *arguments, "--picture", str(picture), "--out", str(out)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(trained) == 2 * len(EXPERIMENTS[name].settings)
    said = capsys.readouterr().out
    assert "training images 5 (paper: 50000), test images 10 (paper: 10000)" in said
    assert "paper's recipe" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "nowhere"], "--root: expected the folder"),
        (["--root", "nowhere", "--fraction", "2"], "--fraction"),
        ([], "--root"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["table1", "--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
