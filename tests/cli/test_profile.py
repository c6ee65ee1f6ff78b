"""`python -m sdgp_fx profile`, and figures 9 and 10 from the same measurements."""

import json

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from benchmarks.paper import times
from benchmarks.paper.__main__ import main as paper
from sdgp_fx.cli import profile
from sdgp_fx.cli.main import main
from sdgp_fx.measurement.convolutions import PRODUCTS, calls_of_convolutions
from sdgp_fx.measurement.timing import Timing

TINY = ["--batch", "2", "--size", "32", "--seconds", "0.001", "--inner", "aot_eager"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "120")


def test_names_of_layers_and_what_is_pruned():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)),
        nn.Conv2d(8, 24, 3, groups=2),
    )
    names, convolutions = zip(*calls_of_convolutions(network, torch.randn(2, 3, 9, 9)), strict=True)
    assert names == ("0", "1.1", "2")
    assert [c.needs_input_gradient for c in convolutions] == [False, True, True]
    first, depthwise, last = convolutions
    assert not any(c.is_pruned(m) for c in (first, depthwise) for m in (2, 4))
    assert [last.is_pruned(m) for m in (2, 4, 8)] == [True, True, False]
    assert str(last) == "2x8x5x5 * 24x4x3x3 in 2 groups"


def layer(input_gradient, largest_m, others=10.0):
    row = {f"{product}_ms": others for product in PRODUCTS}
    return {**row, "input_gradient_ms": input_gradient, "largest_m": largest_m}


def test_the_estimate():
    """By hand: n/m of the input gradients that can be pruned in groups of m."""
    layers = [layer(0.0, 1), layer(20.0, 4), layer(40.0, 32)]
    assert profile.totals_ms(layers)["input_gradient"] == 60
    rows = profile.estimate(
        layers, {"stock": {"ms": 500.0}, "2:4": {"ms": 510.0}}, [(2, 4), (1, 8)]
    )
    first, second = rows
    assert first["convolutions_ms"] == pytest.approx(120 - 30)
    assert first["share"] == pytest.approx(90 / 120)
    assert (first["step_ms"], first["measured_step_ms"]) == (pytest.approx(470), 510)
    assert second["convolutions_ms"] == pytest.approx(120 - 35)
    assert second["measured_step_ms"] is None
    assert profile.estimate(layers, {}, [(2, 4)])[0]["step_ms"] is None


@pytest.fixture
def timed(monkeypatch):
    """No timing: every product and step runs once, and takes a millisecond."""
    seen = []

    def measure(functions, device, seconds, calls=1):
        for function in functions.values():
            function()
        seen.append(list(functions))
        return {name: Timing(1e-3, 0.5e-3, 2e-3, 5) for name in functions}

    monkeypatch.setattr("sdgp_fx.measurement.timing.measure", measure)
    return seen


def test_profile_measures_and_shows(timed, capsys, tmp_path, rewritten):
    picture = tmp_path / "profile.png"
    assert main(["profile", "test_resnet", *TINY, "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert timed[-1] == ["stock", "2:4"]
    ((_, decisions),) = rewritten  # The step at 2:4 is pruned; no other goes through the pass.
    assert sum(decision.pruned for decision in decisions) == 14
    first = next(line for line in out.splitlines() if "conv1.0 " in line)
    assert "dense" in first
    assert "0.000" in first
    assert "layer4.0.conv2" in out
    # 15 layers of 3 ms less the first one's input gradient; 14 of 44 ms can be halved.
    assert "31.8%" in out
    assert "84.1%" in out
    # Here a step takes as long as one product.
    assert "All else in a stock step: -43.00 ms" in out
    assert err.count("\n") == len(timed) - 1 + 2
    pixels = imread(picture)[..., :3]
    for color in profile.COLORS.values():
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(-1) < 0.01).sum() > 200


def test_json(timed, capsys):
    command = ["profile", "test_resnet", *TINY, "--no-step", "--json", "--patterns", "1:4", "2:32"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 15
    assert report["steps"] == {}
    assert [(row["n"], row["m"]) for row in report["estimates"]] == [(1, 4), (2, 32)]
    pruned_at_32 = sum(row["largest_m"] == 32 for row in report["layers"])
    assert 0 < pruned_at_32 < 14
    saved = pruned_at_32 * (1 - 2 / 32)
    assert report["estimates"][1]["convolutions_ms"] == pytest.approx(44 - saved)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such_network"], "MODEL: expected a network of timm, got 'no_such_network'"),
        (["test_vit", "--size", "33"], "--size: test_vit takes no 33x33 images"),
        (["test_resnet", "--patterns", "2-4"], "--patterns: expected n:m"),
        (["test_resnet", "--patterns", "5:4"], "sdgp.n: expected 1 <= n <= sdgp.m = 4, got 5"),
        (["test_resnet", "--plot", "no/such/folder.png"], "--plot"),
        (["test_resnet", "--batch", "0"], "--batch"),
    ],
)
def test_what_it_refuses(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["profile", *arguments])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert said in err.splitlines()[-1]
    assert out == ""


def test_figures_9_and_10_share_what_was_measured(timed, capsys, tmp_path, monkeypatch):
    def measure_steps(workload, patterns, seconds, begin):
        timed.append(["stock", *(f"{n}:{m}" for n, m in patterns)])
        return {name: {"ms": 90.0, "low_ms": 80.0, "high_ms": 95.0} for name in timed[-1]}

    monkeypatch.setattr(times, "measure_steps", measure_steps)
    out, pictures = tmp_path / "times.json", [tmp_path / f"{name}.png" for name in times.FIGURES]
    arguments = ["--model", "test_resnet", "--batch", "2", "--size", "32", "--dtype", "float32"]
    arguments += ["--compiler", "aot_eager", "--device", "cpu", "--seconds", "0.001"]
    for name, picture in zip(times.FIGURES, pictures, strict=True):
        assert paper([name, *arguments, "--out", str(out), "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    measured = len(timed)
    assert timed[-1] == ["stock", "2:4"]
    assert shown.count("31.82%") == 2
    assert shown.count("33.17%") == 2
    assert "measured step, sdgp 2:4: 90.0 ms, quartiles 80.0 to 95.0" in shown
    assert "83.4%" in shown  # 1 - 33.17% / 2
    rows = json.loads(out.read_text())["rows"]
    assert [row.get("step") for row in rows] == [None] * 15 + ["stock", "2:4"]
    first, second = (imread(picture) for picture in pictures)
    assert first.shape == second.shape
    assert (first != second).any()

    # Nothing is measured twice, and nothing of another setting is taken.
    assert paper(["fig10", *arguments, "--out", str(out)]) == 0
    assert len(timed) == measured
    with pytest.raises(SystemExit):
        paper(["fig9", *arguments, "--batch", "4", "--out", str(out)])
    assert "--out: expected a new file" in capsys.readouterr().err
