"""Test the product on sparse tensor cores on a GPU that has some."""

import pytest
import torch

from sdgp_fx.kernels.op import prune_nm
from sdgp_fx.kernels.sparse import choice, cuda, cusparselt, measured
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD, why_not_sparse
from sdgp_fx.kernels.sparse.problem import Problem

from ...helpers.input_grads import channels_last, make_case

pytestmark = pytest.mark.gpu

# The share of its norm by which an input gradient may differ: it is rounded once, as cuDNN's.
ERROR = {torch.bfloat16: 8e-3, torch.float16: 1e-3}

LAYERS = {
    "3x3": {"kernel": (3, 3), "size": (13, 15), "padding": 1},
    "5x5, dilated": {"kernel": (5, 5), "size": (17, 17), "padding": 2, "dilation": 2},
    "1x1": {"kernel": (1, 1), "size": (7, 7)},
    "1 dimension": {"kernel": (3,), "size": (33,)},
    "linear": {"kernel": (), "size": (), "batch": 300},
}


def problem_on_gpu(layer, dtype, pattern=(2, 4), prune="magnitude", last=True, **changes):
    case = make_case(96, 128, **{"batch": 9} | LAYERS[layer] | changes, dtype=dtype)
    tensors = (case.grad_output.cuda(), case.weight.cuda())
    grad_output, weight = map(channels_last, tensors) if last else tensors
    seed = torch.tensor([5], device="cuda")
    problem = Problem(*case.arguments(*pattern, prune, seed=seed))
    problem = problem._replace(grad_output=grad_output, weight=weight)
    if why := why_not_sparse(problem):
        pytest.skip(why)
    return problem


def error(problem):
    """Compare with the library's product, in float32, of the gradient pruned before."""
    grad_output, weight, seed, n, m, prune, rescale, *_ = problem
    pruned = prune_nm(grad_output, seed, n, m, prune, rescale, 1)
    dense = problem._replace(grad_output=pruned.float(), weight=weight.float())
    expected = choice.products_of(dense)[measured.DENSE]()
    actual = PRUNED_INPUT_GRAD(*problem).float()
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS)
def test_agrees_with_the_library(layer, dtype, last):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert error(problem_on_gpu(layer, dtype, last=last)) < ERROR[dtype]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layer", ["1x1", "linear"])
def test_cusparselt_agrees_with_the_library(layer, last, monkeypatch):
    problem = problem_on_gpu(layer, torch.bfloat16, last=last, batch=16)
    if why := cusparselt.why_not(problem):
        pytest.skip(why)
    monkeypatch.setattr(cuda, "_takes_cusparselt", lambda problem: True)
    assert error(problem) < ERROR[torch.bfloat16]
    assert measured.CUSPARSELT in choice.measure(problem)


@pytest.mark.parametrize("prune", ["random", "rescaled_magnitude", "mvue"])
@pytest.mark.parametrize("pattern", [(1, 2), (1, 4), (2, 16)])
def test_patterns_and_functions(pattern, prune):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        problem = problem_on_gpu("3x3", torch.bfloat16, pattern, prune)
        assert error(problem) < ERROR[torch.bfloat16]


def test_a_cuda_graph_replays_it():
    problem = problem_on_gpu("3x3", torch.bfloat16)
    expected = PRUNED_INPUT_GRAD(*problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = PRUNED_INPUT_GRAD(*problem)
    result.fill_(float("nan"))
    graph.replay()
    assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    problem = problem_on_gpu("3x3", torch.bfloat16)
    expected = PRUNED_INPUT_GRAD(*problem)
    moved = {name: getattr(problem, name).to("cuda:1") for name in ("grad_output", "weight")}
    result = PRUNED_INPUT_GRAD(*problem._replace(**moved))
    assert result.device == torch.device("cuda:1")
    assert torch.equal(result.to(expected.device), expected)


def test_is_measured():
    times = choice.measure(problem_on_gpu("3x3", torch.bfloat16))
    assert all(time > 0 for time in times.values())
