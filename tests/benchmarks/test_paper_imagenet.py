"""Test `benchmarks.paper.imagenet` end to end on a tiny folder of images, alone and in torchrun."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.paper import imagenet
from benchmarks.paper.experiment import Setting
from benchmarks.paper.imagenet import Process, Recipe, main
from benchmarks.paper.resnet9 import convolution
from sdgp_fx import SDGPConfig

CLASSES, BATCH = 2, 4
TINY = Recipe("test_resnet", 2, BATCH, 0.1, 32, 32, 32, "float32", "aot_eager")
ALONE = Process(0, 1, torch.device("cpu"))
RANDOM = Setting("random", SDGPConfig(prune="random"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write two batches of images to train on, and five images to test; return their folder."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 2 * BATCH), ("val", 5)):
        for i in range(count):
            folder = root / part / str(i % CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_recipe_of_the_paper():
    recipe = Recipe()
    rates = [imagenet.learning_rate(epoch, recipe) for epoch in (0, 1, 2, 45, 88)]
    assert rates == pytest.approx([1e-4, (1 + 1e-4) / 2, 1, 0.5, 0])
    sizes = [imagenet.resolution(epoch, recipe) for epoch in (0, 65, 70, 71, 76, 87)]
    assert sizes == [160, 160, 160, 192, 192, 192]


def small(model, num_classes):
    layers = (convolution(3, 4, stride=2), convolution(4, 8))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def test_a_run_goes_on_with_the_same_numbers(root, tmp_path, monkeypatch):
    def train(name):
        torch.compiler.reset()
        path = tmp_path / name
        imagenet.train(TINY, RANDOM, 0, root, 0, ALONE, path)
        checkpoint = torch.load(path.with_suffix(".pt"))
        rows = json.loads(path.read_text())["rows"]
        assert rows == checkpoint["rows"]
        return [{**row, "seconds": 0} for row in rows], checkpoint["states"]["network"]

    monkeypatch.setattr(imagenet.timm, "create_model", small)
    rows, weights = train("whole.json")
    assert [row["epoch"] for row in rows] == [1, 2]

    keep = imagenet.keep

    def interrupted(path, facts, rows, parts):
        if len(rows) == 2:
            raise KeyboardInterrupt
        keep(path, facts, rows, parts)

    monkeypatch.setattr(imagenet, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("parts.json")
    monkeypatch.setattr(imagenet, "keep", keep)
    assert len(torch.load(tmp_path / "parts.pt")["rows"]) == 1
    torch.rand(7)  # Other code may draw numbers in between.
    rows_in_parts, weights_in_parts = train("parts.json")
    assert rows_in_parts == rows
    assert all(map(torch.equal, weights.values(), weights_in_parts.values()))

    # There is nothing left to train, but a run with other settings is not resumed.
    assert train("parts.json")[0] == rows
    with pytest.raises(ValueError, match=r"--out: expected a new file.*which has {'seed': 0}"):
        imagenet.train(TINY, RANDOM, 1, root, 0, ALONE, tmp_path / "parts.json")


@pytest.mark.slow
def test_under_torchrun(root, tmp_path):
    out = tmp_path / "run.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    options = {"root": root, "model": "test_resnet", "epochs": 1, "batch": BATCH, "out": out}
    options |= {"first-size": 32, "last-size": 32, "test-size": 32, "dtype": "float32"}
    options |= {"compiler": "aot_eager", "workers": 0, "device": "cpu", "lr": 0.1}
    listed = [f"--{name}={value}" for name, value in options.items()]
    run = subprocess.run(
        [*torchrun, "-m", "benchmarks.paper.imagenet", *listed],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "images 8 (paper: 1281167)" in run.stdout
    assert run.stdout.count("paper imagenet on") == run.stderr.count("epoch 1 of 1") == 1
    stored = json.loads(out.read_text())
    (row,) = stored["rows"]
    assert stored["settings"]["processes"] == 1
    assert row["accuracy"] * 5 == pytest.approx(round(row["accuracy"] * 5))


def test_processes_share_the_images(root):
    data = imagenet.folder(root, "train")
    data.transform = lambda image: torch.from_numpy(np.array(image)).flatten()[:3]
    seen = [
        [
            image
            for rank in range(2)
            for images, _ in imagenet.training_batches(
                data, epoch, 0, TINY, 0, replace(ALONE, rank=rank, count=2)
            )
            for image in images.tolist()
        ]
        for epoch in range(2)
    ]
    assert len(set(map(tuple, seen[0]))) == 2 * BATCH
    assert sorted(seen[0]) == sorted(seen[1])
    assert seen[0] != seen[1]
    numbers = {imagenet.number(*place) for place in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))}
    assert len(numbers) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--root"),
        (["--root", "nowhere"], "--root: expected a folder with train and val"),
        (["--root", "{root}", "--model", "resnet"], "--model: expected a network of timm"),
        (["--root", "{root}", "--batch", "9"], "--batch: expected a multiple of 1"),
        (["--root", "{root}", "--n", "5"], "n: expected 1 <= n"),
        (["--root", "{root}", "--out", "no/where"], "--out"),
    ],
)
def test_command_refuses(arguments, message, root, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--device", "cpu", *(argument.format(root=root) for argument in arguments)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
