"""Test the fast recipe of `benchmarks.paper`: its parts by hand, and that runs repeat."""

import dataclasses
import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchvision", reason="needs torchvision")

from benchmarks.paper import cifar10, experiment, fast, race, signals
from benchmarks.paper.__main__ import main
from benchmarks.paper.cifar10 import Images, normalize
from benchmarks.paper.experiment import Setting
from benchmarks.paper.fast import FastNet, FastRecipe, FastRun, Lookahead, Trainer
from sdgp_fx import SDGPConfig
from sdgp_fx.measurement import timing

# Channels 4, 16 and 16; an epoch has two steps, and half of another is run.
TINY = FastRecipe(
    epochs=1.5, batch=8, width=1 / 16, dtype="float32", compiler="aot_eager", curve=True
)
RANDOM = Setting("random", SDGPConfig(prune="random"))


def images(count):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10)


def make_trainer(recipe=TINY, setting=RANDOM):
    data = images(20)
    return Trainer(recipe, setting.compile("aot_eager"), data, data, setting.dense_last)


def test_the_schedule():
    rates = [fast.schedule(done) for done in (0, 0.115, 0.23, 0.615, 1)]
    assert rates == pytest.approx([0.2, 0.6, 1, (1 + 0.07) / 2, 0.07])


def test_augmentation_by_hand():
    """The image is mirrored before it is shifted, and padded by reflection."""
    batch = images(5)
    which, top, left, mirror = map(
        torch.tensor, ([4, 0, 2, 2], [0, 2, 4, 1], [2, 1, 3, 4], [0, 1, 0, 1])
    )
    result = fast.augment(batch.images, which, top, left, mirror)
    for i in range(len(which)):
        image = normalize(batch.images[which[i]][None])
        image = image.flip(3) if mirror[i] else image
        padded = F.pad(image, (2, 2, 2, 2), "reflect")[0]
        expected = padded[:, top[i] : top[i] + 32, left[i] : left[i] + 32]
        assert torch.equal(result[i], expected)


def test_mirrored_in_every_other_epoch():
    trainer = make_trainer()
    epochs = [
        {
            int(which): int(flip)
            for step in epoch
            for which, flip in zip(step[2], step[5], strict=True)
        }
        for epoch in trainer._epochs(0, 4)
    ]
    assert [len(epoch) for epoch in epochs] == [16, 16]
    both = epochs[0].keys() & epochs[1].keys()
    assert both
    assert all(epochs[0][image] != epochs[1][image] for image in both)
    assert set(epochs[0].values()) == {0, 1}


def test_whitening_filters_whiten():
    """The outputs have the identity as covariance on the patches the filters are computed from."""
    eps = 5e-4
    inputs = normalize(images(40).images)
    filters = fast.whitening_filters(inputs, 2, eps)
    assert filters.shape == (24, 3, 2, 2)
    assert torch.equal(filters[12:], -filters[:12])
    outputs = F.conv2d(inputs, filters[:12]).transpose(0, 1).flatten(1).double()
    covariance = outputs @ outputs.T / outputs.shape[1]
    torch.testing.assert_close(covariance, torch.eye(12).double(), rtol=0, atol=2 * eps)


def test_the_first_weights_hand_their_inputs_on():
    network = FastNet(1 / 16)
    network.reset(normalize(images(8).images))
    weight = network.blocks[1].conv1.weight  # From 4 channels to 16.
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(F.conv2d(x, weight, padding=1)[:, :4], x)
    assert network.blocks[0].norm1.bias.eq(0).all()


def test_a_seed_gives_one_run_whatever_was_run_before():
    """Testing in between changes nothing either."""

    def run(trainer, seed):
        result = trainer.run(seed)
        weights = {name: value.clone() for name, value in trainer.network.state_dict().items()}
        return result, weights

    trainer = make_trainer()
    (_, first), (again, same), (other, others) = (run(trainer, seed) for seed in (1, 0, 0))
    fresh, like_others = run(make_trainer(replace(TINY, curve=False)), 0)
    assert again.losses == other.losses == fresh.losses
    assert again.accuracies == other.accuracies
    assert len(again.losses) == len(again.accuracies) == 2
    assert fresh.accuracies == again.accuracies[-1:]
    assert again.fresh_accuracy == other.fresh_accuracy == fresh.fresh_accuracy
    assert same.keys() == others.keys() == like_others.keys()
    assert all(map(torch.equal, same.values(), others.values()))
    assert all(map(torch.equal, same.values(), like_others.values()))
    assert not all(map(torch.equal, same.values(), first.values()))


def test_a_curve_is_of_the_first_images_and_its_end_of_all(monkeypatch):
    """The network is one that knows the first four images, and takes all others for class 0."""
    monkeypatch.setattr(fast, "CURVE_IMAGES", 4)
    trainer = make_trainer()
    truth = trainer.test.labels[:4]

    def logits(images):
        right = F.one_hot(torch.cat([truth, torch.zeros(len(images) - 4).long()]), 10)
        return right.float()

    monkeypatch.setattr(trainer, "_logits", logits)
    run = trainer.run(0)
    # The four, and one of class 0.
    assert run.accuracies == [1.0, 5 / 20]
    assert run.fresh_accuracy == 5 / 20


def test_the_last_steps_dense(monkeypatch):
    """The last of three steps is dense where a third of them is."""
    trainer = make_trainer(setting=replace(RANDOM, dense_last=1 / 3))
    steps = []

    def loss(name):
        def run(images, labels, which, *draws):
            steps.append(name)
            return sum(p.sum() for p in trainer.network.parameters() if p.requires_grad)

        return run

    monkeypatch.setattr(trainer, "_pruned", loss("pruned"))
    monkeypatch.setattr(trainer, "_dense", loss("dense"))
    monkeypatch.setattr(trainer, "_accuracy", lambda count: 0.5)
    trainer.run(0)
    assert steps == ["pruned", "pruned", "dense"]


def test_lookahead():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    linear, norm = network
    torch.nn.init.constant_(linear.weight, 1.0)
    lookahead = Lookahead(network)
    with torch.no_grad():
        linear.weight.fill_(3.0)
        norm.running_mean.fill_(8.0)
        norm.num_batches_tracked.fill_(5)
        lookahead.update(0.75)
    assert linear.weight.item() == 1.5  # A quarter of the way from 1 to 3.
    assert norm.running_mean.item() == 2
    assert norm.num_batches_tracked.item() == 5
    with torch.no_grad():
        linear.weight.fill_(9.0)
        lookahead.finish()
    assert linear.weight.item() == 1.5


def test_statistics_computed_anew():
    """The statistics are means over whole batches, not the running ones, which forget."""
    trainer = make_trainer()
    inputs = normalize(trainer.data.images)
    trainer.network.reset(inputs)
    parts = inputs.split(TINY.batch)
    for part in parts:
        trainer.network(part)
    block = trainer.network.blocks[0]
    running = block.norm1.running_mean.clone()
    trainer._compute_statistics_anew()
    with torch.no_grad():
        means = [
            F.max_pool2d(block.conv1(F.gelu(trainer.network.whiten(part))), 2).mean((0, 2, 3))
            for part in parts
        ]
    assert len(means) == 3
    torch.testing.assert_close(block.norm1.running_mean, torch.stack(means).mean(0))
    assert not torch.allclose(block.norm1.running_mean, running)
    norms = [m for m in trainer.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.4}


def test_too_few_images():
    with pytest.raises(ValueError, match="--batch: expected at most 4"):
        Trainer(TINY, {}, images(4), images(4))


def test_optimizer():
    network = FastNet(1 / 16)
    whitening, weights, biases = fast.make_optimizer(network, TINY).param_groups
    assert whitening["params"] == [network.whiten.bias]
    assert {p.dim() for p in weights["params"]} == {2, 4}
    assert {p.dim() for p in biases["params"]} == {1}
    assert biases["lr"] == pytest.approx(64 * weights["lr"])
    for group in (whitening, weights, biases):  # Decay doesn't depend on how fast a group learns.
        decay = 0.0153 * TINY.batch / 1024 / (1 + 1 / (1 - 0.85))
        assert group["lr"] * group["weight_decay"] == pytest.approx(decay)
    recipe = dataclasses.replace(TINY, bias_scale=1.0)
    _, weights, biases = fast.make_optimizer(network, recipe).param_groups
    assert biases["lr"] == weights["lr"]
    trained = len([p for p in network.parameters() if p.requires_grad])
    assert sum(len(g["params"]) for g in (whitening, weights, biases)) == trained


# The command


@pytest.fixture
def trainers(monkeypatch):
    """Return the trainers that are made: (recipe, arguments for torch.compile, seeds)."""
    made = []

    class Recorded:
        def __init__(self, recipe, compile, data, test, dense_last):
            self.seeds = []
            made.append((recipe, compile, self.seeds))

        def run(self, seed, watch):
            self.seeds.append(seed)
            return FastRun([2.0], [0.5], [1.0], 0.6)

        def by_epoch(self, seed):
            self.seeds.append(seed)
            run = FastRun([2.0] * 3, [0.25, 0.5, 0.75], [1.0] * 3, 0.6)
            return iter([run] * 4)

    monkeypatch.setattr(experiment, "Trainer", Recorded)
    monkeypatch.setattr(cifar10, "load", lambda root, device: (images(10), images(10)))
    return made


def command(*arguments):
    return main(["table1", "--root", ".", "--device", "cpu", "--recipe", "fast", *arguments])


def test_a_setting_is_compiled_once_for_all_seeds(trainers, tmp_path, capsys):
    out = tmp_path / "runs.json"
    assert command("--seeds", "3", "--epochs", "2.5", "--width", "0.5", "--out", str(out)) == 0
    assert [seeds for *_, seeds in trainers] == [[0, 1, 2]] * 4
    recipe = trainers[0][0]
    assert (recipe.epochs, recipe.width, recipe.batch, recipe.lr) == (2.5, 0.5, 1024, 11.5)
    saved = json.loads(out.read_text())
    assert saved["settings"]["name"] == "fast"
    assert {row["fresh_accuracy"] for row in saved["rows"]} == {0.6}
    said = capsys.readouterr().out
    assert "epochs 2.5 (fast recipe: 9.9)" in said
    # Nothing is done again, and no run of the other recipe is taken.
    assert command("--seeds", "3", "--epochs", "2.5", "--width", "0.5", "--out", str(out)) == 0
    assert len(trainers) == 4


def test_chosen_settings_alone(trainers):
    assert command("--only", "magnitude", "--only", "dense", "--seeds", "1") == 0
    assert ["options" in compile for _, compile, _ in trainers] == [True, False]


def test_no_time_is_left(trainers, capsys):
    assert command("--minutes", "1e-9") == 0
    assert trainers == []
    assert "dense" in capsys.readouterr().out


def test_signals_along_training():
    data = images(20)
    settings = [RANDOM, Setting("channels", SDGPConfig(prune="magnitude", structure="channel"))]
    rows = signals.run(settings, 2, TINY, data, data, None).rows
    assert {row["seed"] for row in rows} == {0, 1}
    assert {row["epoch"] for row in rows} == {0, 1, 2}
    assert {row["layer"] for row in rows} == {2, 3, 4, 5, 6, 7}
    assert {row["setting"] for row in rows} == {"random", "channels"}
    assert all(0 < row["pruned"]["error"] < 1 for row in rows)


# Side by side


def test_settings_that_take_turns_train_as_alone():
    data = images(20)
    settings = [
        Setting("dense"),
        Setting("1:4", SDGPConfig(n=1, m=4)),
        Setting("2:4", SDGPConfig()),
    ]
    recipe = replace(TINY, epochs=2.5, curve=False)
    with torch._dynamo.config.patch(recompile_limit=1):  # Fewer than there are settings.
        rows = race.run(settings, 2, recipe, data, data, None).rows
    assert [(row["setting"], row["seed"]) for row in rows] == [
        (setting.name, seed) for seed in (0, 1) for setting in settings
    ]
    alone = make_trainer(replace(recipe, curve=True), settings[1])
    for row in experiment.runs_of(rows, settings[1]):
        run = alone.run(row["seed"])
        assert (row["losses"], row["accuracies"]) == (run.losses, run.accuracies)
        assert row["fresh_accuracy"] == run.fresh_accuracy
    assert len({tuple(row["losses"]) for row in rows}) == len(rows)


def test_settings_take_turns(trainers, tmp_path, capsys):
    out, picture = tmp_path / "race.json", tmp_path / "race.png"
    arguments = ["race", "--root", ".", "--device", "cpu", "--recipe", "fast", "--seeds", "2"]
    arguments += ["--epochs", "3", "--only", "dense", "--only", "2:4", "--out", str(out)]
    assert main([*arguments, "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    names = [line.split(" ", 1)[1].split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert names == ["dense", "2:4"] * 6
    out.write_text(re.sub('"date": "[^"]*"', '"date": "long ago"', out.read_text()))
    assert main(arguments) == 0
    assert "long ago" in capsys.readouterr().out  # When the runs were made.
    assert [seeds for *_, seeds in trainers] == [[0, 1]] * 2
    with pytest.raises(SystemExit):  # They would be compared with epochs of another time.
        main([*arguments, "--only", "1:4"])
    assert "--out: expected a new file" in capsys.readouterr().err


def test_times_to_an_accuracy(capsys):
    """The pruned epoch takes half of the dense one beside it, whatever the machine did."""
    assert race.epochs_to(0.5, [0.25, 0.75]) == 1.5
    assert race.epochs_to(0.25, [0.5, 0.25]) == 0.5
    assert race.epochs_to(0.8, [0.25, 0.75]) == math.inf
    pruned = Setting("2:4", SDGPConfig())
    runs = {
        Setting("dense"): FastRun([2.0] * 3, [0.25, 0.5, 0.7604], [9.0, 2.0, 4.0], 0.6),
        pruned: FastRun([2.0] * 3, [0.25, 0.25, 0.75], [90.0, 1.0, 2.0], 0.6),
        Setting("1:4", SDGPConfig(n=1)): FastRun([2.0] * 3, [0.1] * 3, [1.0] * 3, 0.6),
    }
    rows = [experiment.make_row(setting, 0, run) for setting, run in runs.items()]
    dense = race.dense_runs(rows, list(runs))
    assert race.common_accuracy(dense) == 0.75
    times = race.warm_epochs(rows[1:2]), race.warm_epochs(dense)
    assert timing.ratio(*times).median == 0.5
    race.show(rows, list(runs))
    *_, half, never = (re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert half[1:] == ["75.00", "60.00", "1.50", "0.500 (0.500 to 0.500)", "1.50 (1.50 to 1.50)"]
    assert never[-1] == "never"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "--only", "none"], "--only: expected one of dense; random; magnitude"),
        (["table1", "--minutes", "0"], "--minutes: expected a number above 0"),
        (["table1", "--recipe", "slow"], "--recipe: invalid choice: 'slow'"),
        (["table1", "--curve"], "--curve: expected --recipe fast, got paper"),
        (["table1", "--bias-scale", "1"], "--bias-scale: expected --recipe fast, got paper"),
        (["table1", "--epochs", "1.5"], "--epochs: expected an int with --recipe paper, got 1.5"),
        (["fig4", "--recipe", "fast"], "--recipe: expected paper for fig4, got fast"),
        (["race"], "--recipe: expected fast for race, got paper"),
        (["race", "--recipe", "fast", "--epochs", "2"], "--epochs: expected more than 2 for race"),
        (["race", "--recipe", "fast", "--only", "2:4"], "--only: expected dense among them, got 2"),
        (["table1", "--recipe", "fast"], "--batch: expected at most 10, the images, got 1024"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(cifar10, "load", lambda root, device: (images(10), images(10)))
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--root", ".", "--device", "cpu"])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    *progress, line = err.splitlines()
    assert message in line
    assert out == ""
    assert not progress
