"""Test what every kind of layer can do, and what the pass notes of it, on real graphs."""

import operator

import pytest
import torch
from torch import nn

from sdgp_fx import SDGPConfig
from sdgp_fx.inductor import DENSE_HALF_FIRST
from sdgp_fx.kernels.op import CHANNEL_FACTOR, PRUNE_NM
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.linears import MM
from sdgp_fx.passes.marks import DECISION, FACTOR_IN_WEIGHT, is_pruned
from sdgp_fx.passes.prune_input_grads import FINDERS, find_layers, prune_input_grads
from sdgp_fx.passes.statistics import record_statistics

from ..helpers.graphs import joint_graph, random_inputs
from ..helpers.layers import CONVOLUTIONS, LINEARS, convolution_graph, linear_graph

aten = torch.ops.aten
BOTH = SDGPConfig(targets="conv,linear")
GRAPHS = {
    **{f"conv, {name}": (convolution_graph, name) for name in CONVOLUTIONS},
    **{f"linear, {name}": (linear_graph, name) for name in LINEARS},
}
every_graph = pytest.mark.parametrize("name", GRAPHS)


def make_graph(name):
    make, layer = GRAPHS[name]
    return make(layer)


def only_layer(gm):
    (layer,) = find_layers(gm.graph, BOTH)
    return layer


def outputs(gm, inputs):
    gm.recompile()
    with torch.no_grad():
        return [value for value in gm(*inputs) if value is not None]


def test_every_target_has_a_finder():
    assert SDGPConfig(targets=tuple(FINDERS)).targets == tuple(FINDERS)


# Replacing the input gradient


def doubled_input_grad(layer):
    """Return twice the input gradient, from a product of its own."""
    node, graph = layer.node, layer.node.graph
    with graph.inserting_before(node):
        if node.target is CONVOLUTION_BACKWARD:
            half = graph.call_function(node.target, (*node.args[:10], [True, False, False]))
            product = graph.call_function(operator.getitem, (half, 0))
        else:
            product = graph.call_function(node.target, node.args)
        return graph.call_function(aten.mul.Tensor, (product, 2))


@every_graph
def test_another_node_takes_the_place_of_the_input_gradient_and_of_nothing_else(name):
    gm = make_graph(name)
    inputs = random_inputs(gm)
    before = outputs(gm, inputs)
    layer = only_layer(gm)
    layer.replace_input_grad(doubled_input_grad(layer))
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    after = outputs(gm, inputs)
    changed = [i for i, pair in enumerate(zip(after, before, strict=True)) if differ(*pair)]
    assert len(changed) == 1
    assert torch.equal(after[changed[0]], 2 * before[changed[0]])
    # The rest of a convolution computes no input gradient any more.
    for node in gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD):
        computed = [value is not None for value in node.meta.get("val", (True, None, None))]
        assert computed == node.args[10]


def differ(a, b):
    return not torch.equal(a, b)


# Properties of layers


@every_graph
def test_multiply_adds_are_those_of_the_values_of_the_gradient(name):
    """With the stride of a transposed convolution, they are those on average."""
    layer = only_layer(make_graph(name))
    values = layer.grad_output.meta["val"].numel()
    if "transposed" in name:
        stride = layer.node.args[4]
        kernel = layer.weight.meta["val"].shape[2:].numel()
        expected = layer.input.meta["val"].numel() * layer.channels // layer.groups * kernel
        assert layer.macs == expected
        per_value = layer.weight.meta["val"].shape[0] // layer.groups * kernel
        assert layer.macs_per_grad_value == per_value // torch.Size(stride).numel()
    else:
        assert layer.macs == values * layer.macs_per_grad_value


class TwoOfEach(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(4, 8, 3, bias=False), nn.Conv1d(8, 8, 3, bias=False))
        self.head = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False))

    def forward(self, x):
        return self.body(x), self.head(x.mT)


def test_a_layer_without_an_input_gradient_has_its_grad_output():
    """It is the gradient that the layer after it computes, not a node of the forward."""
    gm = joint_graph(TwoOfEach(), torch.randn(2, 4, 9))
    layers = {kind: [] for kind in FINDERS}
    for layer in find_layers(gm.graph, BOTH):
        layers[layer.kind].append(layer)
    for last, first in layers.values():
        assert (last.has_input_grad, first.has_input_grad) == (True, False)
        assert first.has_weight_grad
        assert first.grad_output.meta["partitioner_tag"] == "is_backward"
        assert first.channels == 8
        node = first.grad_output
        while node is not last.node:
            node = node.args[0]
        assert first.grad_output.meta["val"].numel() == last.input.meta["val"].numel()
        assert first.macs == first.grad_output.meta["val"].numel() * first.macs_per_grad_value


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("kind", FINDERS)
def test_a_weight_gradient_is_told_from_an_input_gradient(kind, is_frozen):
    """Both products multiply grad_output; that of the weight reads the input as well."""
    layer, shape = {
        "conv": (nn.Conv1d(8, 8, 3, bias=False), (2, 8, 9)),
        "linear": (nn.Linear(8, 8, bias=False), (4, 8)),
    }[kind]
    layer.requires_grad_(not is_frozen)
    gm = joint_graph(layer, torch.randn(shape, requires_grad=True))
    found = only_layer(gm)
    assert (found.has_input_grad, found.has_weight_grad) == (True, not is_frozen)
    decisions = prune_input_grads(gm.graph, BOTH)
    assert [d.layer.has_weight_grad for d in decisions] == [not is_frozen]


# Notes of the pass


@pytest.mark.parametrize("settings", [{}, {"rescale": "channel"}, {"structure": "channel"}])
@every_graph
def test_a_decision_keeps_its_layer_as_it_was(name, settings):
    """`explain` reads the layer after the graph has been rewritten."""
    gm = make_graph(name)
    before = only_layer(gm)
    numbers = (before.macs, before.macs_per_grad_value, before.weight_shape, before.channels)
    (decision,) = prune_input_grads(gm.graph, SDGPConfig(targets="conv,linear", **settings))
    layer = decision.layer
    assert decision.pruned
    assert (layer.macs, layer.macs_per_grad_value, layer.weight_shape, layer.channels) == numbers
    assert (layer.grad_output, layer.weight, layer.input) == (
        before.grad_output,
        before.weight,
        before.input,
    )
    assert "layer" not in decision.to_dict()
    marked = [node.meta[DECISION] for node in gm.graph.nodes if DECISION in node.meta]
    assert decision in marked
    assert all(mark.layer is None for mark in marked)


@pytest.mark.parametrize("name", ["conv, conv2d", "linear, rows", "linear, column-major"])
def test_elements_are_known_to_be_pruned_without_the_marks(name):
    """A copy of a graph may lack the nodes' meta, except for the values."""
    gm = make_graph(name)
    (first,) = prune_input_grads(gm.graph, BOTH)
    for node in gm.graph.nodes:
        for mark in [key for key in node.meta if str(key).startswith("sdgp_")]:
            del node.meta[mark]
    before = str(gm.graph)
    decisions = prune_input_grads(gm.graph, BOTH)
    assert str(gm.graph) == before
    assert [d for d in decisions if d.pruned] == [first]
    assert any(map(is_pruned, gm.graph.nodes))


@pytest.mark.parametrize("name", ["conv, conv2d", "linear, rows"])
def test_statistics_read_that_a_factor_is_in_the_weight(name):
    def scaled(keeps_mark):
        """Return whether the statistics are of the pruned gradient times its factor."""
        gm = make_graph(name)
        prune_input_grads(gm.graph, SDGPConfig(targets="conv,linear", rescale="channel"))
        (pruned,) = gm.graph.find_nodes(op="call_function", target=PRUNE_NM)
        (factor,) = gm.graph.find_nodes(op="call_function", target=CHANNEL_FACTOR)
        assert pruned.meta[FACTOR_IN_WEIGHT].args[0] is factor
        if not keeps_mark:
            del pruned.meta[FACTOR_IN_WEIGHT]
        readers = len(pruned.users), len(factor.users)
        record_statistics(gm.graph, "0")
        (times,) = {
            node.args[1].target is aten.view.default
            for node in pruned.users
            if node.target is aten.mul.Tensor and isinstance(node.args[1], type(node))
        } or {False}
        assert len(pruned.users) > readers[0]
        return times

    assert scaled(keeps_mark=True)
    assert not scaled(keeps_mark=False)


@pytest.mark.parametrize("settings", [{}, {"rescale": "channel"}, {"structure": "channel"}])
def test_order_of_the_halves_is_what_the_caller_wants(settings):
    for first in ((), ("cuda",), ("cpu",), DENSE_HALF_FIRST):
        gm = convolution_graph("conv2d with bias")
        prune_input_grads(gm.graph, SDGPConfig(**settings), dense_half_first=first)
        position = {node: i for i, node in enumerate(gm.graph.nodes)}
        halves = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
        (dense,) = (node for node in halves if node.args[10][1])
        (product,) = (node for node in halves if node.args[10][0])
        assert (position[dense] < position[product.args[0]]) == ("cpu" in first)
        gm.graph.lint()


def test_linear_layers_have_no_halves():
    graphs = []
    for first in ((), ("cpu",)):
        gm = linear_graph("rows")
        prune_input_grads(gm.graph, BOTH, dense_half_first=first)
        assert gm.graph.find_nodes(op="call_function", target=MM)
        graphs.append(str(gm.graph))
    assert graphs[0] == graphs[1]
