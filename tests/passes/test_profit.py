"""Test `layers="profitable"`: the rule on shapes and device, its decisions for both structures."""

import math

import pytest
import torch
from torch import nn

from sdgp_fx import SDGPConfig, explain
from sdgp_fx.config import STRUCTURES
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes import decisions as why
from sdgp_fx.passes.convolutions import find_convolutions
from sdgp_fx.passes.profit import COST, is_profitable, is_sparse_faster
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from ..helpers.graphs import copy_graph, joint_graph
from ..helpers.layers import Block, convolution_on

NOT_PROFITABLE = why.NOT_PROFITABLE["channel"]

# Valid at 2:4, with so many values that little else counts.
LEAST = math.ceil(2 * (COST["cpu"].value + COST["cpu"].kept / 2))


def profitable(structure="channel", **settings):
    return SDGPConfig(structure=structure, layers="profitable", **settings)


def reason(graph, config):
    """Return why the only layer of graph stays dense."""
    (decision,) = prune_input_grads(graph, config)
    return decision.reason


def convolution(inputs, kernel=1, groups=1):
    return nn.Conv2d(inputs, 64, kernel, groups=groups), (8, inputs, 64, 64)


RULE = {
    "1x1": (*convolution(LEAST + 20), ""),
    "1x1 of fewer": (*convolution(LEAST - 1), NOT_PROFITABLE),
    "3x3": (*convolution(LEAST // 9 + 4, kernel=3), ""),
    "grouped": (*convolution(4 * LEAST - 4, groups=4), NOT_PROFITABLE),
    "transposed": (nn.ConvTranspose2d(LEAST + 20, 64, 1), (8, LEAST + 20, 64, 64), ""),
    "transposed, strided": (
        nn.ConvTranspose2d(LEAST + 20, 64, 1, stride=2),
        (8, LEAST + 20, 64, 64),
        NOT_PROFITABLE,
    ),
    "few positions": (nn.Conv2d(1024, 1024, 1), (2, 1024, 4, 4), NOT_PROFITABLE),
    "more positions": (nn.Conv2d(1024, 1024, 1), (8, 1024, 8, 8), ""),
    "linear": (nn.Linear(1024, 1024), (512, 1024), ""),
    "linear of few rows": (nn.Linear(1024, 1024), (16, 1024), NOT_PROFITABLE),
    "small": (nn.Conv2d(1024, 8, 1), (1, 1024, 8, 8), NOT_PROFITABLE),
    # Only the cost of a call speaks against it.
    "small, with few weights": (nn.Conv2d(1024, 8, 1), (4, 1024, 8, 8), NOT_PROFITABLE),
}


@pytest.mark.parametrize("name", RULE)
def test_layers_for_which_it_is_profitable(name):
    layer, shape, expected = RULE[name]
    gm = joint_graph(layer, torch.ones(shape, requires_grad=True))
    targets = ("conv", "linear")
    for structure in STRUCTURES:
        config = SDGPConfig(structure=structure, targets=targets)
        assert reason(copy_graph(gm).graph, config) == ""
    assert reason(copy_graph(gm).graph, profitable(targets=targets)) == expected


# Elements


def product(layer, shape, **settings):
    """Return the decision on a layer whose elements are pruned."""
    gm = joint_graph(layer, torch.ones(shape, requires_grad=True))
    (decision,) = prune_input_grads(gm.graph, SDGPConfig(targets="conv,linear", **settings))
    return decision


@pytest.mark.parametrize(
    ("layer", "shape", "is_faster"),
    [
        (nn.Conv2d(256, 64, 3, padding=1), (8, 256, 16, 16), True),
        (nn.Conv2d(16, 64, 1), (8, 16, 32, 32), False),  # Few multiply-adds a value.
        (nn.Conv2d(256, 8, 1), (1, 256, 4, 4), False),  # A call costs.
        (nn.Linear(2048, 512), (512, 2048), True),
    ],
)
def test_elements_are_profitable_where_skipping_zeros_is_faster(layer, shape, is_faster):
    decision = product(layer, shape)
    assert decision.pruned
    assert decision.product == ("sparse" if is_faster else "dense")
    assert decision.product_reason == ("" if is_faster else why.NOT_FASTER)
    assert product(layer, shape, product="sparse").product == "sparse"
    decision = product(layer, shape, layers="profitable")
    assert decision.reason == ("" if is_faster else why.NOT_PROFITABLE["element"])
    # What is asked for does not make it faster.
    decision = product(layer, shape, layers="profitable", product="sparse")
    assert decision.pruned == is_faster
    assert not product(layer, shape, layers="profitable", product="dense").pruned


@pytest.mark.parametrize(
    ("capability", "dtype", "is_faster"),
    [
        ("AVX2", torch.float32, {"1x1": True, "3x3": True}),
        ("AVX512", torch.float32, {"1x1": False, "3x3": True}),
        ("AVX512", torch.bfloat16, {"1x1": False, "3x3": False}),
    ],
)
def test_the_rule_knows_vectors_and_dtype(capability, dtype, is_faster, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layers = {
        "1x1": (nn.Conv2d(128, 128, 1), (16, 128, 32, 32)),
        "3x3": (nn.Conv2d(64, 64, 3, padding=1), (16, 64, 32, 32)),
    }
    for name, (layer, shape) in layers.items():
        gm = joint_graph(layer.to(dtype), torch.ones(shape, dtype=dtype, requires_grad=True))
        (found,) = find_convolutions(gm.graph)
        faster = is_sparse_faster(found, SDGPConfig(), or_not_pruned=True)
        assert faster == is_faster[name]


def test_a_dense_product_has_to_wait_for_its_prune(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer, shape = nn.Conv2d(128, 128, 1), (16, 128, 32, 32)
    assert product(layer, shape).product == "sparse"
    assert not product(layer, shape, layers="profitable").pruned


def test_nothing_is_saved_where_most_is_kept():
    layer = nn.Conv2d(256, 64, 3, padding=1), (8, 256, 16, 16)
    assert product(*layer, n=1).product == "sparse"
    assert product(*layer, n=3).product == "dense"


def test_a_call_costs():
    layer, shape, _ = RULE["small, with few weights"]
    values = layer.out_channels * shape[0] * shape[2] * shape[3]
    cost = COST["cpu"]
    least = cost.value + cost.kept / 2 + cost.weight / 2 * layer.weight.numel() / values
    saved = layer.in_channels / 2
    assert least < saved / 2
    assert least + cost.call / values > 2 * saved


@pytest.mark.parametrize(
    ("device", "inputs", "expected"),
    [
        ("cpu", LEAST + 20, True),
        ("cuda", LEAST + 20, False),
        ("xpu", LEAST + 20, False),
        ("cuda", 8192, True),
        ("xpu", 8192, True),
    ],
)
def test_a_device_without_costs_of_its_own_counts_as_a_gpu(device, inputs, expected):
    graph, _ = convolution_on(device, torch.float32, (8, 64, 64, 64), inputs)
    (layer,) = find_convolutions(graph)
    assert is_profitable(layer, profitable()) == expected


def test_fewer_channels_are_profitable_for_more_layers():
    """Other reasons come first."""
    layer, shape = convolution(LEAST - 1)
    gm = joint_graph(layer, torch.ones(shape, requires_grad=True))
    for settings, expected in (
        ({"m": 4}, NOT_PROFITABLE),
        ({"m": 8, "n": 1}, ""),
        ({"m": 4, "include": "none"}, why.EXCLUDED),
    ):
        assert reason(copy_graph(gm).graph, profitable(**settings)) == expected


def test_symbolic_sizes_count_as_large():
    layer = nn.Conv2d(1024, 1024, 1)
    reasons = []
    for dynamic in (False, True):
        torch._dynamo.reset()
        x = torch.randn(2, 1024, 3, 3, requires_grad=True)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        reasons.append(reason(joint_graph(layer, x).graph, profitable()))
    assert reasons == [NOT_PROFITABLE, ""]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_that_are_not_profitable_are_left_alone(structure):
    gm = joint_graph(Block(), torch.randn(1, 3, 9, 9))
    before = gm.graph.python_code("self").src
    decisions = prune_input_grads(gm.graph, profitable(structure))
    assert gm.graph.python_code("self").src == before
    assert not gm.graph.find_nodes(op="call_function", target=PRUNE_NM)
    other = prune_input_grads(gm.graph, SDGPConfig(structure=structure))
    # The reasons why a layer can't be pruned come first.
    assert [d.reason for d in decisions] == [
        d.reason or why.NOT_PROFITABLE[structure] for d in other
    ]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_second_run_keeps_what_was_pruned(structure):
    """The rule's opinion of the product that is left doesn't matter."""
    layer, shape, _ = RULE["more positions"]
    gm = joint_graph(layer, torch.ones(shape, requires_grad=True))
    decisions = prune_input_grads(gm.graph, SDGPConfig(structure=structure))
    assert prune_input_grads(gm.graph, profitable(structure)) == decisions
    assert decisions[0].pruned


@pytest.mark.parametrize("structure", STRUCTURES)
def test_explain_and_the_warning_tell_what_is_not_profitable(structure):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 3, 4, 4)
    options = {"sdgp.structure": structure, "sdgp.layers": "profitable"}
    reasons = [layer.reason for layer in explain(model, x, options=options)]
    assert reasons == [why.NO_INPUT_GRADIENT, why.NOT_PROFITABLE[structure]]
    options["sdgp.inner"] = "aot_eager"
    with pytest.warns(UserWarning, match=f"pruned nothing.*{why.NOT_PROFITABLE[structure]}"):
        torch.compile(model, backend="sdgp", options=options)(x).sum().backward()
