"""Test cuSPARSELt's product without a GPU: what it is given, and when it is taken."""

import pytest
import torch

from sdgp_fx.kernels import reference
from sdgp_fx.kernels.sparse import cuda, cusparselt, measured, store
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
from sdgp_fx.kernels.sparse.problem import Problem

from ...helpers.input_grads import channels_last, make_case

LAYERS = {
    "linear": {"kernel": (), "size": (), "batch": 32},
    "1x1": {"kernel": (1, 1), "size": (4, 6)},
    "1 dimension": {"kernel": (1,), "size": (8,)},
}


@pytest.fixture
def library(monkeypatch):
    """Stand in for cuSPARSELt: it asks for rows in memory, of which two in four are not zero."""

    def compress(rows):
        assert rows.dim() == 2
        rows = as_rows(rows)
        assert (rows.unflatten(1, (-1, 4)) != 0).sum(2).max() <= 2
        return rows

    def multiply(compressed, weight):
        return compressed @ as_rows(weight)

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)


def as_rows(tensor):
    """Read memory as rows of the tensor's length, as the library does."""
    assert tensor.data_ptr() % 16 == 0
    return torch.as_strided(tensor, tensor.shape, (tensor.shape[1], 1))


def problem_of(layer, last=False, **changes):
    case = make_case(32, 64, **LAYERS[layer] | changes)
    if last:
        memory = {name: channels_last(getattr(case, name)) for name in ("grad_output", "weight")}
        case = case.replace(**memory)
    return case, Problem(*case.arguments(2, 8, "rescaled_magnitude"))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_multiplies_the_pruned_gradient(layer, last, library):
    case, problem = problem_of(layer, last)
    assert cusparselt.why_not(problem) == ""
    result = cusparselt.pruned_input_grad(problem)
    pruned = reference.prune_nm(case.grad_output, None, 2, 8, "rescaled_magnitude", "group")
    torch.testing.assert_close(result, case.input_grad(pruned).float())
    assert result.stride() == PRUNED_INPUT_GRAD(*problem).stride()


@pytest.mark.parametrize("layer", ["linear", "1x1"])
def test_what_is_not_in_rows_is_copied(layer, library):
    """Column-major gradients, as of one contiguous sample, and weights that are not aligned."""
    changes = {"size": (4, 4), "batch": 1} if layer == "1x1" else {}
    case = make_case(32, 64, **LAYERS[layer] | changes)
    grad_output = case.grad_output
    if layer == "linear":
        grad_output = grad_output.T.contiguous().T
    memory = torch.empty(case.weight.numel() + 1)
    weight = memory[1:].view(case.weight.shape).copy_(case.weight)
    case = case.replace(grad_output=grad_output, weight=weight)
    result = cusparselt.pruned_input_grad(Problem(*case.arguments(2, 4, "magnitude")))
    pruned = reference.prune_nm(case.grad_output, None, 2, 4, "magnitude", "group")
    torch.testing.assert_close(result, case.input_grad(pruned).float())


@pytest.mark.parametrize(
    ("layer", "changes", "why"),
    [
        ("linear", {"batch": 0}, "no multiple of 16"),
        ("1x1", {"kernel": (3, 3), "padding": 1}, "multiplies matrices alone"),
        ("1x1", {"padding": 1}, "multiplies matrices alone"),
        ("linear", {"batch": 40}, "no multiple of 16"),
        ("1x1", {"size": (5, 5)}, "no multiple of 16"),
    ],
)
def test_what_is_not_covered(layer, changes, why, library):
    assert why in cusparselt.why_not(problem_of(layer, **changes)[1])


def test_torch_without_the_library(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert cusparselt.why_not(problem_of("linear")[1]) == "torch was built without cuSPARSELt"


@pytest.mark.parametrize(
    ("kernel", "times", "expected"),
    [
        ("a kernel", None, "own"),
        ("a kernel", {measured.SPARSE: 2.0}, "own"),
        ("a kernel", {measured.SPARSE: 1.0, measured.CUSPARSELT: 2.0}, "own"),
        ("a kernel", {measured.SPARSE: 2.0, measured.CUSPARSELT: 1.0}, "cusparselt"),
        (None, None, "cusparselt"),
    ],
)
def test_the_faster_one_multiplies(kernel, times, expected, library, monkeypatch, tmp_path):
    """Also where the gradient's strides are others than those of the measurement."""
    called = []
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(cuda, "_find", lambda product, device: kernel)
    measured._load.cache_clear()
    if times:
        _, problem = problem_of("1x1")
        last = channels_last(problem.grad_output)
        measured.save(problem._replace(grad_output=last), times)
    monkeypatch.setattr(cuda, "pack", lambda problem: "packed")
    monkeypatch.setattr(cuda, "multiply", lambda *arguments: called.append("own"))
    monkeypatch.setattr(
        cusparselt, "pruned_input_grad", lambda problem: called.append("cusparselt")
    )
    _, problem = problem_of("1x1")
    cuda.pruned_input_grad(problem)
    assert called == [expected]
    assert cuda.why_not(problem) == ""


def test_the_others_stay_dense_without_a_compiler(library, monkeypatch):
    monkeypatch.setattr(cuda, "_find", lambda product, device: None)
    monkeypatch.setattr(cuda, "why_no_compiler", lambda: "TileLang is not installed")
    assert cuda.why_not(problem_of("1x1")[1]) == ""
    _, problem = problem_of("1x1", kernel=(3, 3), padding=1)
    assert cuda.why_not(problem) == "TileLang is not installed"
