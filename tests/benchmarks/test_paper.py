"""Test `python -m benchmarks.paper`: the recipe's parts, runs that are done once, the command."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import terminal
from benchmarks.paper import cifar10, experiment, maps, pictures, signals
from benchmarks.paper.__main__ import EXPERIMENTS, main
from benchmarks.paper.cifar10 import Draw, Images, Recipe, Run
from benchmarks.paper.experiment import Setting
from benchmarks.paper.resnet9 import ResNet9, convolution
from benchmarks.paper.scaled import ScaledPruning
from benchmarks.paper.settings import BEYOND, CHANNELS, FIG8, PRECISION, TABLE1
from sdgp_fx import SDGPConfig
from sdgp_fx.config import PRUNING_FUNCTIONS

from ..helpers.graphs import joint_graph

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
    """Stand in for ResNet9; the gradient of the second convolution is pruned."""

    def __init__(self, width):
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(convolution(3, width), convolution(width, 12), pool, nn.Flatten())


def test_training_dense_and_pruned():
    data = images(16)
    pruned = Setting("pruned", SDGPConfig(prune="random"))
    dense, once, again = (
        cifar10.train(TINY, setting.compile("aot_eager"), data, data, 0, make=Small)
        for setting in (Setting("dense"), pruned, pruned)
    )
    assert once == replace(again, seconds=once.seconds)
    assert dense.losses[1] != once.losses[1]
    assert dense.losses[1] == pytest.approx(once.losses[1], rel=0.1)
    assert len(dense.accuracies) == 2


def test_more_settings_than_dynamo_recompiles():
    data = images(8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in (1, 2):
            arguments = Setting("pruned", SDGPConfig(n=n)).compile("aot_eager"), data, data, 0
            cifar10.train(replace(TINY, epochs=1), *arguments, make=Small)


def test_the_last_steps_dense():
    """The last two of four steps are dense; up to them, every step is pruned."""
    data = images(16)
    pruned = Setting("pruned", SDGPConfig(n=1, prune="magnitude"))
    recipe = replace(TINY, batch=4, epochs=1)

    def losses(setting):
        arguments = setting.compile("aot_eager"), data, data, 0
        monitored = []
        with pytest.MonkeyPatch.context() as patch:
            update = cifar10.update
            patch.setattr(
                cifar10,
                "update",
                lambda loss, *rest: (monitored.append(loss.item()), update(loss, *rest)),
            )
            cifar10.train(recipe, *arguments, make=Small, dense_last=setting.dense_last)
        return monitored

    always, half = losses(pruned), losses(replace(pruned, dense_last=0.5))
    whole, never = losses(replace(pruned, dense_last=1.0)), losses(Setting("dense"))
    assert whole == never != always
    # The first dense step is the third; its gradients show in the loss of the fourth.
    assert half[:3] == always[:3]
    assert half[3] != always[3]


def test_pruned_gradients_times_two():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1))
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def gradients(scale):
        torch.manual_seed(0)
        torch.compiler.reset()
        setting = Setting("random", SDGPConfig(prune="random"), scale=scale)
        compiled = torch.compile(network, **setting.compile("aot_eager"))
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
    """Replace training and return its calls; each run's accuracy encodes its seed and setting."""
    calls = []

    def train(recipe, compile, data, test, seed, watch, make=Small, dense_last=0.0):
        network = Small(4)
        for done in range(recipe.epochs + 1):
            watch(done, network)
        calls.append((compile, recipe.dtype, seed))
        value = 0.5 + 0.01 * seed + (0.001 if "options" not in compile else 0)
        return Run([2.0, 1.0], [0.1, value], [1.0, 1.0])

    for module in (experiment, maps):
        monkeypatch.setattr(module, "train", train)
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
    for run in (experiment.run, signals.run, maps.run):
        with pytest.raises(ValueError, match="--out: expected a new file, or one of paper"):
            run(settings, 2, other, images(10), images(10), path)


def test_runs_say_where_they_were_made(trained, tmp_path, monkeypatch):
    """What one machine has begun, another may go on with."""
    for seeds, device in ((1, "one"), (2, "another")):
        made = {"device": device, "torch": "2.14.1", "date": "today", "commit": None}
        monkeypatch.setattr(experiment, "environment", lambda _, made=made: made)
        arguments = (TINY, images(10), images(10), tmp_path / "runs.json")
        report = experiment.run(in_float32(TABLE1), seeds, *arguments)
        assert report.environment == made
    rows = report.rows
    assert [row["device"] for row in rows] == ["one"] * len(TABLE1) + ["another"] * len(TABLE1)
    assert {row["torch"] for row in rows} == {"2.14.1"}
    monkeypatch.setattr(experiment, "environment", lambda _: {})
    assert experiment.run(in_float32(TABLE1), 2, *arguments).environment == made
    assert experiment.run(in_float32(FIG8), 2, *arguments, minutes=-1).environment == made


def test_runs_are_shared_by_what_was_trained(trained, tmp_path):
    arguments = (TINY, images(10), images(10), tmp_path / "runs.json")
    experiment.run(in_float32(TABLE1), 1, *arguments)
    experiment.run(in_float32(FIG8), 1, *arguments)
    # Dense and 2:4 have runs already; random selection with scaling is another setting.
    assert len(trained) == len(TABLE1) + len(FIG8) - 2
    experiment.run(in_float32(BEYOND), 1, *arguments)
    assert len(trained) == len(TABLE1) + len(FIG8) - 2 + 4
    experiment.run(in_float32(CHANNELS), 1, *arguments)
    assert len(trained) == len(TABLE1) + len(FIG8) + 2 + len(CHANNELS) - 2
    experiment.run(PRECISION, 1, *arguments)
    assert [dtype for _, dtype, _ in trained[-8:]] == ["float16"] * 4 + ["bfloat16"] * 4


def test_progress_has_an_estimate(trained, capsys):
    experiment.run(in_float32(TABLE1[:2]), 1, TINY, images(10), images(10), None)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "1/4 dense, seed 0, epoch 1 of 2"
    assert last == "4/4 random, seed 0, epoch 2 of 2, about 0 min left"
    assert terminal.time_left(60, 3, 9) == ", about 2 min left"


def test_differences_are_taken_seed_by_seed(trained, capsys):
    settings = (Setting("dense"), Setting("other", SDGPConfig(n=1), 95.2))
    rows = experiment.run(settings, 3, TINY, images(10), images(10), None).rows
    experiment.show(rows, settings)
    *_, line = capsys.readouterr().out.splitlines()
    columns = ["other", "3", "51.00", "1.00", "-0.10", "±", "0.00", "0.00", "-", "95.2", "-"]
    assert line.split() == columns


def test_a_picture_leaves_settings_without_runs(trained):
    settings = in_float32(TABLE1)
    rows = experiment.run(settings[:2], 1, TINY, images(10), images(10), None).rows
    left, _ = pictures.draw_accuracies(rows, settings, "title").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["dense", "random"]


def test_measures_by_hand():
    g = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    halved = signals.compare(g / 2, g)
    assert halved == {"error": 0.5, "cosine": pytest.approx(1), "bias": 0.5}
    kept = signals.compare(torch.tensor([[0.0, 0.0], [0.0, 4.0]]), g)
    assert kept == pytest.approx({"error": 3 / 5, "cosine": 4 / 5, "bias": 16 / 25})


class Deep(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(convolution(3, 4), convolution(4, 8), convolution(8, 8, stride=2), *pool)


def test_arriving_gradients_are_those_of_the_backend():
    batch = images(4)
    inputs = cifar10.normalize(batch.images)
    setting = Setting("2:4", SDGPConfig(prune="magnitude"))
    network = torch.compile(Deep(), **setting.compile("aot_eager"))
    smoothing = cifar10.LABEL_SMOOTHING
    F.cross_entropy(network(inputs), batch.labels, label_smoothing=smoothing).backward()
    eager = Deep()
    first, *_ = signals.convolutions(eager)
    signals.backward(eager, inputs, batch.labels, 0.1, first, setting.prune)
    compiled_first, *_ = signals.convolutions(network)
    torch.testing.assert_close(first.weight.grad, compiled_first.weight.grad, rtol=1e-4, atol=1e-6)
    shifts = signals.shift_gradients(eager, 2), signals.shift_gradients(network, 2)
    torch.testing.assert_close(*shifts, rtol=1e-4, atol=1e-6)
    # The hooks are gone.
    dense = signals.backward(Deep(), inputs, batch.labels, 0.1)
    eager.zero_grad()
    F.cross_entropy(eager(inputs), batch.labels, label_smoothing=smoothing).backward()
    assert not torch.allclose(first.weight.grad, compiled_first.weight.grad, rtol=1e-2)
    assert len(dense) == 3


def test_signals_of_a_layer():
    batch = images(4)
    settings = [Setting("magnitude", SDGPConfig(prune="magnitude")), Setting("dense")]
    network = Deep()
    before = [parameter.clone() for parameter in network.state_dict().values()]
    inputs = cifar10.normalize(batch.images)
    rows = signals.measure(network, inputs, batch.labels, settings, cifar10.LABEL_SMOOTHING)
    assert [(row["setting"], row["layer"]) for row in rows] == [
        (name, layer) for name in ("magnitude", "dense") for layer in (2, 3)
    ]
    perfect = pytest.approx({"error": 0, "cosine": 1, "bias": 1})
    for row in rows:
        for signal in signals.SIGNALS:
            # Nothing is pruned after the last layer.
            last = signal in ("arriving", "shift") and row["layer"] == 3
            assert (row[signal] == perfect) == (row["setting"] == "dense" or last)
    pruned = rows[0]["pruned"]
    # Keeping the largest values of a gradient is a projection.
    assert pruned["cosine"] ** 2 == pytest.approx(pruned["bias"])
    assert pruned["error"] ** 2 == pytest.approx(1 - pruned["bias"])
    assert all(map(torch.equal, before, network.state_dict().values()))


@pytest.mark.parametrize("prune", PRUNING_FUNCTIONS)
def test_whole_channels_are_pruned_in_eager_mode(prune):
    gradient = torch.randn(3, 8, 5, 5)
    setting = Setting("channels", SDGPConfig(prune=prune, structure="channel"))
    pruned = setting.prune(gradient)
    is_kept = pruned.abs().sum((0, 2, 3)) > 0
    assert is_kept.view(2, 4).sum(1).tolist() == [2, 2]
    factor = (pruned / gradient).mean((0, 2, 3))[is_kept]
    kept = gradient[:, is_kept] * factor[:, None, None]
    torch.testing.assert_close(pruned[:, is_kept], kept)
    assert (factor == 1).all() == (prune in ("magnitude", "random"))


def test_maps_of_the_second_convolution():
    batch = images(4)
    settings = [Setting("dense"), Setting("1:4", SDGPConfig(n=1, prune="magnitude"))]
    dense, pruned = (
        torch.tensor(row["maps"])
        for row in maps.maps(Deep(), cifar10.normalize(batch.images), batch.labels, settings)
    )
    assert dense.shape == pruned.shape == (4, 32, 32)
    assert torch.equal(pruned, torch.where(pruned != 0, dense, 0))
    assert torch.equal((pruned != 0).sum(0), torch.ones(32, 32))
    network = maps.small_resnet18()
    second = signals.convolutions(network)[1]
    assert second is network.layer1[0].conv1
    with torch.no_grad():
        assert network.layer1(network.relu(network.conv1(batch.images[:1].float()))).shape[2] == 32


def test_one_seed_has_no_spread():
    for of in (experiment.deviation, experiment.half_interval, experiment.detectable):
        assert math.isnan(of([1.0]))
    assert experiment.percent(math.nan) == "-"
    assert experiment.with_interval([1.0]) == "+1.00"


def test_intervals_are_students():
    """Of three values with deviation 1, whose mean's standard error is 3 ** -0.5."""
    values = [1.0, 2.0, 3.0]
    assert experiment.half_interval(values) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert experiment.detectable(values) == pytest.approx((4.3027 + 1.0607) / 3**0.5, rel=1e-4)
    assert experiment.with_interval(values) == "+2.00 ± 2.48"


def test_differences_from_dense(capsys):
    settings = [Setting("dense", paper=95.3), Setting("half", SDGPConfig(), paper=95.2)]
    found = {"dense": [(0.5, 0.6), (0.7, 0.8)], "half": [(0.4, 0.6), (0.5, 0.9)]}
    rows = [
        {**setting.facts(), "seed": seed, "accuracy": usual, "fresh_accuracy": fresh}
        for setting in settings
        for seed, (usual, fresh) in enumerate(found[setting.name])
    ]
    half = settings[1]
    assert experiment.less_dense(rows, half) == pytest.approx([-10, -20])
    assert experiment.less_dense(rows, half, "fresh_accuracy") == pytest.approx([0, 10])
    assert experiment.paper_less_dense(settings, half) == pytest.approx(-0.1)
    experiment.show(rows, settings)
    line = next(line for line in capsys.readouterr().out.splitlines() if "half" in line)
    # 12.706 and 1.376 are the quantiles of Student's t with one degree of freedom.
    shown = ["45.00", "7.07", "-15.00", "63.53", "70.41", "+5.00", "63.53", "95.2", "-0.1"]
    assert [word for word in line.split() if word not in ("half", "2", "±", "│")] == shown
    for row in rows:
        del row["fresh_accuracy"]  # As by the paper's recipe.
    assert experiment.less_dense(rows, half, "fresh_accuracy") == []


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "race"])
def test_command(name, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar10, "load", lambda root, device: (images(10), images(10)))
    picture, out = tmp_path / "picture.png", tmp_path / "runs.json"
    arguments = ["--root", str(tmp_path), "--seeds", "2", "--fraction", "0.5", "--epochs", "1"]
    arguments += ["--device", "cpu"]
    assert main([name, *arguments, "--picture", str(picture), "--out", str(out)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = {"fig4": 1, "signal": 2}.get(name, 2 * len(EXPERIMENTS[name].settings))
    assert len(trained) == runs
    assert main([name, *arguments, "--out", str(out)]) == 0
    assert len(trained) == runs
    said = capsys.readouterr().out
    assert "training images 5 (paper: 50000), test images 10 (paper: 10000)" in said
    assert "all as in the paper" not in said


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


def test_runs_in_the_repository_are_of_these_settings():
    """The stored runs are found, under former names of options too."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "paper" / "runs.json"
    stored = json.loads(path.read_text())
    report = experiment.resume("paper", stored["settings"], {}, path)
    for setting in in_float32((*TABLE1, *BEYOND, *CHANNELS)):
        assert len(experiment.runs_of(report.rows, setting)) == 3
    assert len(report.rows) == len(stored["rows"])


def test_older_files_of_the_fast_recipe_have_its_rate_of_biases():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "paper" / "fast_h200.json"
    facts = json.loads(path.read_text())["settings"]
    assert "bias_scale" not in facts
    for scale, matches in ((64, True), (1.0, False)):
        refused = pytest.raises(ValueError, match="expected a new file")
        with contextlib.nullcontext() if matches else refused:
            experiment.resume("paper", {**facts, "bias_scale": scale}, {}, path)


@pytest.mark.parametrize(
    ("options", "now"),
    [
        ({}, {"structure": "element", "layers": "all"}),
        ({"structure": "channel"}, {"structure": "channel", "layers": "profitable"}),
        ({"structure": "channel_always"}, {"structure": "channel", "layers": "all"}),
        *([({"structure": "channel", "layers": layers},) * 2 for layers in ("all", "profitable")]),
    ],
)
def test_options_by_the_names_that_they_had(options, now):
    row = {"setting": "a", "options": {"n": 2, **options}}
    assert experiment.with_current_options(row)["options"] == {"n": 2, **now}
    dense = {"setting": "a", "options": None, "dense_last": 0.5}
    assert experiment.with_current_options(dense) == dense
