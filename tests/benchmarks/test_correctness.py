"""Test the checks of kernels and of a network: they cover everything, and find what is wrong."""

import itertools

import pytest
import torch

from benchmarks.harness import correctness
from sdgp_fx.kernels.sparse import choice, measured
from sdgp_fx.measurement.convolutions import calls_of_convolutions
from sdgp_fx.measurement.workload import MEMORY_FORMATS, Workload

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


@pytest.mark.parametrize(("factor", "said"), [(1, None), (1.1, "differs by 1.0e-01 of its norm")])
def test_a_wrong_product_is_found(monkeypatch, factor, said):
    products_of = choice.products_of

    def with_another(problem):
        products = products_of(problem)
        return {**products, measured.CUSPARSELT: lambda: factor * products[measured.SPARSE]()}

    monkeypatch.setattr(choice, "products_of", with_another)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    ((_, layer),) = calls_of_convolutions(torch.nn.Conv2d(8, 16, 1), x)
    own, other = correctness.check_product(Workload("m", 2, 5, "float32"), layer)
    assert (own["product"], other["product"]) == ("sparse", "cusparselt")
    assert own["failure"] is None
    assert (other["failure"] is None) if said is None else (said in other["failure"])
