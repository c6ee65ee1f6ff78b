"""Test how a GPU's product is chosen, without one: what is measured, and when nothing is."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdgp_fx.kernels.sparse import choice, cuda, measured, store
from sdgp_fx.kernels.sparse.op import why_not_sparse
from sdgp_fx.kernels.sparse.problem import Problem

from ...helpers.input_grads import make_case


@pytest.fixture
def problem(monkeypatch, tmp_path):
    """A problem of fake tensors on a GPU that is not there."""
    measured._load.cache_clear()
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "sdgp")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    case = make_case(64, 128, (3, 3), (6, 6), padding=1, dtype=torch.bfloat16)
    problem = Problem(*case.arguments(seed=None))
    with FakeTensorMode():
        fake = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in problem[:2])
        return problem._replace(**dict(zip(("grad_output", "weight"), fake, strict=True)))


@pytest.fixture
def timed_as(monkeypatch):
    """Problems that were measured, each of which took its time from `times`."""
    problems = []
    times = {measured.SPARSE: 1.0, measured.DENSE: 2.0}

    def measure(problem):
        problems.append(problem)
        return dict(times)

    monkeypatch.setattr(choice, "measure", measure)
    return problems, times


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({}, ""),
        ({measured.SPARSE: 3.0}, choice.NOT_FASTER),
        ({measured.SPARSE: 3.0, measured.CUSPARSELT: 1.0}, ""),
        ({measured.SPARSE: 3.0, measured.CUSPARSELT: 2.5}, choice.NOT_FASTER),
    ],
)
def test_the_fastest_is_taken_and_kept(problem, timed_as, others, why):
    problems, times = timed_as
    times.update(others)
    assert [choice.why_not_chosen(problem) for _ in range(2)] == [why, why]
    assert problems == [problem]
    (file,) = store.folder().glob("product-*")
    assert json.loads(file.read_text()) == times


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 1},
        {"prune": "magnitude"},
        {"padding": [0, 1]},
        {"input_size": (2, 64, 6, 7)},
    ],
)
def test_each_problem_is_measured_for_itself(problem, timed_as, changes):
    choice.why_not_chosen(problem)
    choice.why_not_chosen(problem._replace(**changes))
    assert len(timed_as[0]) == 2


def test_strides_and_the_gpu_make_other_problems(problem, timed_as, monkeypatch):
    choice.why_not_chosen(problem)
    last = problem.grad_output.to(memory_format=torch.channels_last)
    choice.why_not_chosen(problem._replace(grad_output=last))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    choice.why_not_chosen(problem)
    assert len(timed_as[0]) == 3


def test_a_kernel_that_was_not_there_is_measured(problem, timed_as, monkeypatch):
    problems, times = timed_as
    own = times.pop(measured.SPARSE)
    times[measured.CUSPARSELT] = 3.0
    monkeypatch.setattr(cuda, "has_kernel", lambda problem: False)
    assert [choice.why_not_chosen(problem) for _ in range(2)] == [choice.NOT_FASTER] * 2
    times[measured.SPARSE] = own
    monkeypatch.setattr(cuda, "has_kernel", lambda problem: True)
    assert [choice.why_not_chosen(problem) for _ in range(2)] == ["", ""]
    assert len(problems) == 2


def test_nothing_is_measured_under_deterministic_algorithms(problem, timed_as):
    choice.why_not_chosen(problem)
    torch.use_deterministic_algorithms(True)
    try:
        assert choice.why_not_chosen(problem) == choice.DETERMINISTIC
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(timed_as[0]) == 1


def test_nothing_is_measured_while_a_graph_is_captured(problem, timed_as, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice.why_not_chosen(problem) == choice.CAPTURED
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choice.why_not_chosen(problem)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice.why_not_chosen(problem) == ""
    assert len(timed_as[0]) == 1


def test_noise_lies_as_what_it_stands_for():
    problem = Problem(*make_case(8, 16, (3, 3), (6, 6), padding=1).arguments())
    last = problem.weight.to(memory_format=torch.channels_last)
    with FakeTensorMode() as mode:
        # As the gradient of a mean, which has one value for all positions.
        expanded = torch.empty(2, 16, 1, 1).expand(2, 16, 6, 6)
        fake = problem._replace(grad_output=expanded, weight=mode.from_tensor(last))
    noise = choice._with_noise(fake)
    assert (noise.grad_output.shape, noise.weight.stride()) == ((2, 16, 6, 6), last.stride())
    assert noise.grad_output.unique().numel() > 1000


def test_both_products_compute_the_same(monkeypatch):
    """What is measured, on the CPU: the dense one of a gradient that is pruned already."""
    for kernel, size, padding in (((3, 3), (6, 6), 1), ((), (), 0)):
        case = make_case(8, 16, kernel, size, padding=padding)
        pruned = case.replace(grad_output=torch.zeros_like(case.grad_output))
        pruned.grad_output[:, ::4] = case.grad_output[:, ::4]
        products = choice.products_of(Problem(*pruned.arguments(prune="magnitude")))
        torch.testing.assert_close(products[measured.SPARSE](), products[measured.DENSE]())
        assert why_not_sparse(Problem(*pruned.arguments())) == ""
