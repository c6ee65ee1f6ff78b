"""Test which product layers on a GPU get, without one."""

import pytest
import torch

from sdgp_fx import SDGPConfig
from sdgp_fx.kernels.sparse import cuda
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
from sdgp_fx.passes import decisions
from sdgp_fx.passes.products import skip_zeros
from sdgp_fx.passes.profit import GPU_PACKING
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from ..helpers.layers import convolution_on

# Input channels of a 1x1 layer from which the rule considers the sparse product.
LEAST = 2 * GPU_PACKING + 2


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU with sparse tensor cores, for which kernels can be compiled."""
    monkeypatch.setattr(cuda, "why_no_architecture", lambda device: "")
    monkeypatch.setattr(cuda, "_why_no_kernel", lambda product, device: "")


@pytest.fixture
def measured(monkeypatch):
    """Let measuring find the dense product faster, and count how often it is done."""
    problems = []

    def why_not_chosen(problem):
        problems.append(problem)
        return "measured"

    monkeypatch.setattr(decisions, "why_not_chosen", why_not_chosen)
    return problems


def decide(inputs=1024, dtype=torch.bfloat16, **settings):
    graph, _ = convolution_on("cuda", dtype, (8, 64, 16, 16), inputs)
    config = SDGPConfig(**settings)
    (decision,) = prune_input_grads(graph, config)
    skip_zeros(graph, config)
    found = graph.find_nodes(op="call_function", target=PRUNED_INPUT_GRAD)
    assert len(found) == (decision.product == "sparse")
    return decision


def test_auto_measures_what_the_rule_considers(measured):
    assert decide(LEAST).product_reason == "measured"
    assert len(measured) == 1
    assert measured[0].input_size == (8, LEAST, 16, 16)
    assert decide(LEAST - 64).product_reason == decisions.NOT_FASTER
    assert len(measured) == 1


def test_auto_takes_the_faster_one(monkeypatch):
    monkeypatch.setattr(decisions, "why_not_chosen", lambda problem: "")
    assert decide().product == "sparse"


def test_sparse_is_not_measured(measured):
    assert decide(64, product="sparse").product == "sparse"
    assert decide(product="dense").product_reason == decisions.ASKED_FOR
    assert not measured


def test_what_is_not_covered_says_why(measured):
    layer = decide(dtype=torch.float32, product="sparse")
    assert layer.product_reason == "dtype not supported by the sparse product"
    assert decide(n=3).product_reason == "keeps more than two of four channels"
    assert not measured


def test_which_layers_are_profitable_is_not_measured(measured):
    """All ranks of a distributed training prune the same layers."""
    layer = decide(layers="profitable")
    assert (layer.pruned, layer.product) == (True, "dense")
    assert not decide(LEAST - 64, layers="profitable").pruned
    assert not decide(layers="profitable", product="dense").pruned
