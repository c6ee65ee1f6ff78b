"""Test `python -m sdgp_fx profile`: what it measures, shows and refuses."""

import json

import pytest
import torch
from matplotlib.image import imread

from sdgp_fx.cli.main import main
from sdgp_fx.measurement import pictures

TINY = ["--batch", "2", "--size", "32", "--seconds", "0.001", "--inner", "aot_eager"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "120")


def test_profile_measures_and_shows(timed, capsys, tmp_path, rewritten):
    picture = tmp_path / "profile.png"
    assert main(["profile", "test_resnet", *TINY, "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert timed[-1] == ["stock", "2:4"]
    ((_, decisions),) = rewritten  # Only the step at 2:4 goes through the pass.
    assert sum(decision.pruned for decision in decisions) == 14
    first = next(line for line in out.splitlines() if "conv1.0 " in line)
    assert "dense" in first
    assert "0.000" in first
    assert "layer4.0.conv2" in out
    # 15 layers of 3 ms less the first one's input gradient; 14 of 44 ms can be halved.
    assert "31.8%" in out
    assert "84.1%" in out
    # A step takes as long as one product here.
    assert "All else in a stock step: -43.00 ms" in out
    assert err.count("\n") == len(timed) - 1 + 2
    pixels = imread(picture)[..., :3]
    for color in pictures.COLORS.values():
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
