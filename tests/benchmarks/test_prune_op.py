"""Test the benchmark of the operator: which shapes and settings are timed, and against what."""

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")

from benchmarks import prune_op
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.workload import MEMORY_FORMATS, Workload

CPU = torch.device("cpu")


def test_shapes_that_get_pruned():
    resnet18, resnet50 = (Workload(model, 256, 224) for model in ("resnet18", "resnet50"))
    expected = [(256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 7, 7)]
    assert prune_op.gradient_shapes([resnet18]) == expected
    both = prune_op.gradient_shapes([resnet18, resnet50])
    assert len(both) == len(set(both)) == 11
    assert both[:4] == expected
    assert (256, 2048, 7, 7) in both
    assert (256, 64, 112, 112) not in both  # The first layer has no input gradient.
    convnext = Workload("convnext_tiny", 2, 224)
    assert any(convolution.groups > 1 for convolution in convnext.count_convolutions())
    pruned = prune_op.gradient_shapes([convnext])
    assert pruned == [(2, 192, 28, 28), (2, 384, 14, 14), (2, 768, 7, 7)]


def plan_prune(**settings):
    defaults = {"models": ["resnet18"], "batch": 2, "size": 224, "dtype": "bfloat16"}
    defaults |= {"functions": prune_op.PRUNING_FUNCTIONS, "ms": prune_op.M, "everything": False}
    tasks = prune_op.BENCHMARK.tasks(CPU, {**defaults, "seconds": 0.001, **settings})
    return [(task.name, len(task.run.args[5])) for task in tasks]


def test_prune_op_tries_everything_on_one_shape():
    planned = plan_prune()
    assert [variants for _, variants in planned[:8]] == [1, 1, 6, 6, 1, 1, 1, 1]
    assert {name.split()[-1] for name, _ in planned[:8]} == {"2:4"}
    # The shape of median size, in both formats, with each of the other m.
    assert [name.split()[0] for name, _ in planned[8:]] == [planned[2][0].split()[0]] * 8
    assert {name.split()[-1] for name, _ in planned[8:]} == {"1:2", "4:8", "8:16", "16:32"}
    assert {name.split()[1] for name, _ in planned} == set(MEMORY_FORMATS)


def test_prune_op_can_try_all_or_less():
    assert plan_prune(everything=True, ms=[8]) == [
        (name, 6) for name, _ in plan_prune(everything=True, ms=[8])
    ]
    assert len(plan_prune(everything=True)) == 5 * 4 * 2
    assert [variants for _, variants in plan_prune(functions=["mvue"], ms=[4])] == [1, 1]


def test_prune_op_times_the_operator_and_a_copy(monkeypatch):
    """Both get the same values, in the same strides, at the same settings."""
    seen = {}

    def measure(functions, device, seconds, calls):
        for function in functions.values():
            function()
        seen["names"] = list(functions)
        return {
            name: timing.Timing(2e-3 if i else 1e-3, 0, 0, 1) for i, name in enumerate(functions)
        }

    def operator(x, seed, *settings):
        seen[settings] = x.stride()
        return x

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(prune_op, "prune_nm", operator)
    shape = (2, 8, 5, 5)
    variants = [("mvue", "group"), ("rescaled_magnitude", "channel")]
    rows = prune_op.measure(CPU, shape, "float16", "channels_last", 8, variants, 0.1)
    strides = torch.empty(shape).contiguous(memory_format=torch.channels_last).stride()
    assert seen[4, 8, "mvue", "group", 1] == strides
    assert seen[4, 8, "rescaled_magnitude", "channel", 1] == strides
    assert len(seen["names"]) == 3
    for row in rows:
        assert row["share_of_copy"] == 0.5
        assert row["prune_gb_per_s"] == pytest.approx(2 * 400 * 2 / 2e-3 / 1e9)
        assert row["copy_gb_per_s"] == pytest.approx(2 * 400 * 2 / 1e-3 / 1e9)
    assert [row["rescale"] for row in rows] == [None, "channel"]
