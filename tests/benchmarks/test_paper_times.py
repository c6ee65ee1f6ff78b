"""Test figures 9 and 10, which come from the same measurements."""

import json

import pytest
from matplotlib.image import imread

pytest.importorskip("timm", reason="needs timm")

from benchmarks.paper import times
from benchmarks.paper.__main__ import main as paper


def test_figures_9_and_10_share_what_was_measured(timed, capsys, tmp_path, monkeypatch):
    def measure_steps(workload, inner, patterns, seconds, begin):
        timed.append(["stock", *(f"{n}:{m}" for n, m in patterns)])
        ratio = {"ratio": 0.9, "ratio_low": 0.8, "ratio_high": 1.0}
        return {name: {"ms": 90.0, "low_ms": 80.0, "high_ms": 95.0, **ratio} for name in timed[-1]}

    monkeypatch.setattr(times, "measure_steps", measure_steps)
    out, pictures = tmp_path / "times.json", [tmp_path / f"{name}.png" for name in times.FIGURES]
    arguments = ["--model", "test_resnet", "--batch", "2", "--size", "32", "--dtype", "float32"]
    arguments += ["--compiler", "aot_eager", "--device", "cpu", "--seconds", "0.001"]
    for name, picture in zip(times.FIGURES, pictures, strict=True):
        assert paper([name, *arguments, "--out", str(out), "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    measured = len(timed)
    patterns = [f"{n}:{m}" for n, m in times.PATTERNS]
    assert timed[-1] == ["stock", *patterns]
    assert shown.count("31.82%") == 2
    assert shown.count("33.17%") == 2
    assert "measured step, stock: 90.0 ms, quartiles 80.0 to 95.0\n" in shown
    measured_step = "sdgp 1:4: 90.0 ms, quartiles 80.0 to 95.0; 0.900 (0.800 to 1.000) of stock"
    assert measured_step in shown
    assert "83.4%" in shown  # 1 - 33.17% / 2
    rows = json.loads(out.read_text())["rows"]
    assert [row.get("step") for row in rows] == [None] * 15 + ["stock", *patterns]
    first, second = (imread(picture) for picture in pictures)
    assert first.shape == second.shape
    assert (first != second).any()

    # Nothing is measured twice, and no row of another setting is taken.
    assert paper(["fig10", *arguments, "--out", str(out)]) == 0
    assert len(timed) == measured
    with pytest.raises(SystemExit):
        paper(["fig9", *arguments, "--batch", "4", "--out", str(out)])
    assert "--out: expected a new file" in capsys.readouterr().err
