"""Test training steps: what is compiled and timed, in which order, and the ratios."""

import itertools
import os

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs timm")

from benchmarks import train_step
from sdgp_fx import SDGPConfig
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.steps import make_step
from sdgp_fx.measurement.workload import Workload

MAGNITUDE = SDGPConfig(prune="magnitude", inner="aot_eager")
TINY = Workload("test_resnet", 2, 32, "float32")
SETTINGS = {"mode": "default", "inner": "aot_eager", "compiles": 1, "cudnn_benchmark": False}
SETTINGS |= {"cached": False, "cpu_time": False, "seconds": 1e-9}


def compilers(config=MAGNITUDE, mode="default", **others):
    """Return stock, sdgp with config, and others by name."""
    stock = train_step.Compiler(mode, config, is_stock=True)
    configs = {"sdgp": config, **others}
    return {"stock": stock, **{n: train_step.Compiler(mode, c) for n, c in configs.items()}}


def test_both_start_alike_and_one_is_pruned():
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(1000, (4,))
    losses = {}
    for name, compiler in compilers().items():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 1000))
        step = make_step(compiler.compile(model), model, images, labels, torch.float32)
        with compiler.environment():
            losses[name] = [step().item() for _ in range(3)]
    stock, sdgp = losses.values()
    assert stock[0] == sdgp[0]
    assert stock[2] < stock[0]
    assert sdgp[2] < sdgp[0]
    assert stock[2] != sdgp[2]


def test_every_compilation_starts_with_empty_caches(monkeypatch):
    """The compilers alternate; a mode allows settings only in the environment."""
    steps = []

    def compile_(model, backend, mode):
        assert mode == "max-autotune"
        return "stock" if backend == "aot_eager" else "sdgp"

    def make_step(name, model, *_):
        def step():
            steps.append((name, id(model), dict(os.environ)))
            return torch.tensor(1.0 if name == "stock" else 1.5)

        return step

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(train_step, "make_step", make_step)
    chosen = compilers(SDGPConfig(n=1, prune="mvue", inner="aot_eager"), "max-autotune")
    (row,) = train_step.measure(TINY, chosen, 3, False, 1e-9)
    compiled, timed = steps[:6], steps[6:]
    assert [name for name, *_ in compiled] == ["stock", "sdgp"] * 3
    assert len({environ["TORCHINDUCTOR_CACHE_DIR"] for *_, environ in compiled}) == 6
    for *_, environ in compiled:
        assert (environ["SDGP_N"], environ["SDGP_PRUNE"]) == ("1", "mvue")
    assert [name for name, *_ in timed] == ["stock", "sdgp"] * 7
    assert {model for _, model, _ in timed} == {model for _, model, _ in compiled[4:]}
    assert "SDGP_N" not in timed[0][2]
    assert [len(times) for times in row["compile_s"].values()] == [3, 3]
    assert row["loss_difference"] == 0.5


@pytest.mark.slow
def test_patterns_are_compiled_and_timed_in_turn(monkeypatch):
    """Each pattern has its own code: Dynamo would reuse that of an equal backend."""
    backends = []
    compile_ = torch.compile

    def spy(model, backend, **kwargs):
        backends.append(backend)
        return compile_(model, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    task = train_step.plan([TINY], MAGNITUDE, **SETTINGS, also=[(1, 4)])[-1]
    rows = task.run()
    assert [(row["n"], row["m"]) for row in rows] == [(2, 4), (1, 4)]
    assert len({id(backend) for backend in backends}) == 3
    assert all(a != b for a, b in itertools.combinations(backends, 2))
    assert len({row["stock_ms"] for row in rows}) == 1
    assert len({row["sdgp_ms"] for row in rows}) == 2


def test_ratios_are_those_of_a_round(monkeypatch):
    """Ratios are taken within a round.

    The machine gets slower in every round, and the medians' ratio is 4 / 3.
    """
    columns = {"stock": [1, 2, 3, 4, 5], "sdgp": [2, 4, 3, 4, 5]}
    monkeypatch.setattr(timing, "sample", lambda *_: columns)
    monkeypatch.setattr(timing, "peak_memory", lambda *_: 0)
    monkeypatch.setattr(train_step, "make_step", lambda *_: lambda: torch.tensor(1.0))
    (row,) = train_step.measure(TINY, compilers(), 1, False, 1e-9)
    assert [row[key] for key in ("ratio_low", "ratio", "ratio_high")] == [1, 1, 2]
