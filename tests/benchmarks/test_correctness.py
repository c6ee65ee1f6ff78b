"""Test the checks of kernels and of a network: they cover everything, and find what is wrong."""

import itertools

import pytest
import torch

from benchmarks.harness import correctness
from sdgp_fx.measurement.workload import MEMORY_FORMATS

CPU = torch.device("cpu")


def kernel_case(**changes):
    case = correctness.Case("magnitude", "group", 4, "float32", "channels_last", (3, 12, 5, 7))
    return case._replace(**changes)


def test_all_kernels_are_checked():
    tasks = correctness.plan_kernels(CPU, (4, 2, 8, 16, 32), 0)
    assert len({task.name for task in tasks}) == len(tasks) == 5 * 2 * 6 * 3 * 2
    assert tasks[0].run() == [{**tasks[0].run.args[1]._asdict(), "failure": None}]


def test_kernels_are_checked_in_several_processes(monkeypatch):
    monkeypatch.setattr(correctness, "reference", None)  # In this process nothing can be checked.
    alone = correctness.plan_kernels(CPU, (4,), 0)
    shared = correctness.plan_kernels(CPU, (4,), 2)
    assert [task.name for task in shared] == [task.name for task in alone]
    (row,) = shared[-1].run()
    assert row == {**alone[-1].run.args[1]._asdict(), "failure": None}


def test_gradients_to_check_have_special_values():
    for dtype, memory_format in itertools.product(("float32", "float16"), MEMORY_FORMATS):
        x = correctness.gradient(kernel_case(dtype=dtype, memory_format=memory_format))
        assert x.is_contiguous(memory_format=MEMORY_FORMATS[memory_format])
        assert x.isnan().any()
        assert x.isinf().any()
        assert (x[0] == 0).any()
        assert len(x[0].unique()) < 40


@pytest.mark.parametrize(
    ("prune", "dtype", "change", "said"),
    [
        ("magnitude", "float32", lambda x: x, None),
        ("magnitude", "float32", lambda x: x.contiguous(), "has strides"),
        ("magnitude", "float32", lambda x: torch.where(x == x[1, 0, 0, 0], 0, x), "keeps other"),
        ("magnitude", "float32", lambda x: x * (1 + 2**-23), "has other values"),
        ("random", "bfloat16", lambda x: -x, "has other values"),
        ("mvue", "float32", lambda x: x * (1 + 2**-23), None),
        ("mvue", "float32", lambda x: x * (1 + 2**-17), "has other values"),
        ("rescaled_magnitude", "bfloat16", lambda x: x * (1 + 2**-5), "has other values"),
        ("rescaled_magnitude", "float32", lambda x: torch.nan_to_num(x, 1.0), "has other values"),
    ],
)
def test_differences_are_found(prune, dtype, change, said):
    case = kernel_case(prune=prune, dtype=dtype)
    x = correctness.gradient(case)
    difference = correctness.difference(case, change(x.clone()), x)
    assert difference is None if said is None else difference.startswith(said)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"aot_eager": 2, "inductor": 2}, None),
        ({"aot_eager": 2, "inductor": 2.01}, "gradients differ by"),
        ({"aot_eager": 1, "inductor": 1}, "from those of dense training"),
    ],
)
def test_a_wrong_network_is_found(monkeypatch, factors, said):
    def compile_(network, backend, options):
        return lambda x: factors[options["sdgp.inner"]] * network(x)

    monkeypatch.setattr(torch, "compile", compile_)
    (row,) = correctness.check_network(CPU, "magnitude", "group", "channels_last")
    assert (row["failure"] is None) if said is None else (said in row["failure"])
