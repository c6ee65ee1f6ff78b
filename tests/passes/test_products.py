"""Test which operator computes the input gradient, on edges and on numbers."""

import pytest
import torch
from torch import fx, nn

from sdgp_fx import SDGPConfig
from sdgp_fx.config import RESCALE_SCOPES
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.kernels.record import RECORD
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
from sdgp_fx.passes import decisions as why
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.products import skip_zeros
from sdgp_fx.passes.prune_input_grads import prune_input_grads
from sdgp_fx.passes.statistics import record_statistics

from ..helpers.graphs import joint_graph, random_inputs, run
from ..helpers.layers import (
    CONVOLUTIONS,
    LINEARS,
    PRODUCTS,
    Block,
    assert_same_form,
    convolution_graph,
    linear_graph,
)

SPARSE = {"product": "sparse", "targets": "conv,linear"}
# Products of another form: of the transposed gradient, and with a weight for each sample.
DENSE_LINEARS = ("column-major", "batched", "batched image")
GRAPHS = {
    **dict.fromkeys(CONVOLUTIONS, convolution_graph),
    **{name: linear_graph for name in LINEARS if name not in DENSE_LINEARS},
}
every_graph = pytest.mark.parametrize("name", GRAPHS)


def find(gm, target):
    return gm.graph.find_nodes(op="call_function", target=target)


def in_backward(gm):
    """Return the products of the backward that libraries compute."""
    linear = [n for n in gm.graph.nodes if n.target in PRODUCTS and "source_fn_stack" not in n.meta]
    return [*find(gm, CONVOLUTION_BACKWARD), *linear]


def rewrite(gm, **settings):
    config = SDGPConfig(**{**SPARSE, **settings})
    decisions = prune_input_grads(gm.graph, config)
    skip_zeros(gm.graph, config)
    gm.recompile()
    return decisions


def outputs(gm, inputs):
    torch.manual_seed(0)
    return [value for value in gm(*inputs) if value is not None]


@every_graph
@pytest.mark.parametrize("prune", ["rescaled_magnitude", "random"])
def test_rewrites_the_pruned_product_and_nothing_else(name, prune):
    pruned, gm = GRAPHS[name](name), GRAPHS[name](name)
    prune_input_grads(pruned.graph, SDGPConfig(**SPARSE, prune=prune))
    (prune_nm,) = find(pruned, PRUNE_NM)
    (reader,) = prune_nm.users
    weight_grads = [node for node in in_backward(pruned) if node is not reader]

    (decision,) = rewrite(gm, prune=prune)
    assert (decision.pruned, decision.product, decision.product_reason) == (True, "sparse", "")
    (product,) = find(gm, PRUNED_INPUT_GRAD)
    grad_output, weight, seed, *settings = product.args
    assert grad_output.name == prune_nm.args[0].name
    assert weight.name == reader.args[2 if reader.target is CONVOLUTION_BACKWARD else 1].name
    assert (seed and seed.name) == (prune_nm.args[1] and prune_nm.args[1].name)
    assert settings[:4] == list(prune_nm.args[2:6])
    # Nothing prunes beside it, and the weight gradient is what it was.
    assert find(gm, PRUNE_NM) == []
    assert list(map(repr_of, in_backward(gm))) == list(map(repr_of, weight_grads))


def repr_of(node):
    """Return a call with the names of its operands."""
    return node.target, fx.map_arg(node.args, lambda operand: operand.name)


@pytest.mark.parametrize("name", ["positions", "image", "functional", "frozen"])
def test_a_linear_layer_over_positions_is_a_convolution(name):
    """With the scope that is over them; what reads the result gets rows, as before."""
    pruned, gm = GRAPHS[name](name), GRAPHS[name](name)
    prune_input_grads(pruned.graph, SDGPConfig(**SPARSE, rescale="feature_map"))
    (prune_nm,) = find(pruned, PRUNE_NM)
    (decision,) = rewrite(gm, rescale="feature_map")
    assert (decision.product, decision.product_reason) == ("sparse", "")
    (product,) = find(gm, PRUNED_INPUT_GRAD)
    grad_output, weight, _, *settings = product.args
    assert repr_of(grad_output) == repr_of(prune_nm.args[0])
    batch, *positions, channels = LINEARS[name][1]
    ones, zeros = [1] * len(positions), [0] * len(positions)
    assert weight.meta["val"].shape == (16, 8, *ones)
    assert settings[4:] == [[batch, channels, *positions], ones, zeros, ones, False, 1]
    assert find(gm, PRUNE_NM) == find(gm, torch.ops.aten.clone.default) == []


class Summed(nn.Linear):
    """Linear layer whose gradient is one value for all features, and so has no adjacent ones."""

    def forward(self, x):
        return super().forward(x).sum(-1)


def test_rows_are_copied_where_the_operator_gives_none():
    results = []
    for product in ("dense", "sparse"):
        torch.manual_seed(0)
        gm = joint_graph(Summed(8, 16), torch.randn(3, 5, 8, requires_grad=True))
        inputs = random_inputs(gm)
        assert [d.product for d in rewrite(gm, product=product, rescale="feature_map")] == [product]
        results.append(outputs(gm, inputs))
    assert find(gm, torch.ops.aten.clone.default)
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)


@every_graph
@pytest.mark.parametrize(
    "settings", [{}, {"prune": "mvue"}, {"rescale": "channel"}, {"rescale": "feature_map"}]
)
def test_same_numbers(name, settings):
    pruned, gm = GRAPHS[name](name), GRAPHS[name](name)
    inputs = random_inputs(gm)
    prune_input_grads(pruned.graph, SDGPConfig(**SPARSE, **settings))
    pruned.recompile()
    rewrite(gm, **settings)
    assert find(gm, PRUNED_INPUT_GRAD)
    for mine, expected in zip(outputs(gm, inputs), outputs(pruned, inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)  # Sums in another order.


@every_graph
@pytest.mark.parametrize("rescale", RESCALE_SCOPES)
def test_idempotent(name, rescale):
    gm = GRAPHS[name](name)
    decisions = rewrite(gm, rescale=rescale)
    code = gm.code
    assert rewrite(gm, rescale=rescale) == decisions
    assert gm.code == code


def test_idempotent_with_layers_that_stay_dense():
    gm = joint_graph(Block(), torch.randn(2, 3, 9, 9))
    decisions = rewrite(gm)
    assert {decision.pruned for decision in decisions} == {True, False}
    code = gm.code
    assert rewrite(gm) == decisions
    assert gm.code == code


@every_graph
@pytest.mark.parametrize("rescale", ["group", "feature_map"])
def test_recorded_values_match_the_real_ones(name, rescale):
    gm = GRAPHS[name](name)
    inputs = random_inputs(gm)
    rewrite(gm, rescale=rescale)
    values = run(gm, inputs)
    (product,) = find(gm, PRUNED_INPUT_GRAD)
    for node in list(gm.graph.nodes)[list(gm.graph.nodes).index(product) :]:
        if node.op != "output":
            assert_same_form(node.meta["val"], values[node.name])


def test_strides_are_those_that_the_rest_was_traced_with():
    """The operator gives channels-last where the library gave something else."""
    gm = convolution_graph("conv1d")
    (node,) = find(gm, CONVOLUTION_BACKWARD)
    before = node.meta["val"][0].stride()
    grad_output = node.args[0]
    with gm.graph.inserting_before(node):
        last = gm.graph.call_function(torch.ops.aten.permute.default, (grad_output, [0, 2, 1]))
        rows = gm.graph.call_function(torch.ops.aten.clone.default, (last,))
        back = gm.graph.call_function(torch.ops.aten.permute.default, (rows, [0, 2, 1]))
    value = grad_output.meta["val"]
    last.meta["val"] = value.permute(0, 2, 1)
    rows.meta["val"] = last.meta["val"].contiguous()
    back.meta["val"] = rows.meta["val"].permute(0, 2, 1)
    node.update_arg(0, back)
    inputs = random_inputs(gm)
    expected = outputs(gm, inputs)
    assert [d.product for d in rewrite(gm)] == ["sparse"]
    (product,) = find(gm, PRUNED_INPUT_GRAD)
    assert product.meta["val"].stride() != before
    results = outputs(gm, inputs)
    assert [r.stride() for r in results] == [e.stride() for e in expected]


# Left alone


def unchanged(gm, **settings):
    """Return the decision on the only layer of a graph whose product must stay the library's."""
    (decision,) = rewrite(gm, **settings)
    assert find(gm, PRUNED_INPUT_GRAD) == []
    assert len(find(gm, PRUNE_NM)) == decision.pruned
    assert decision.product == ("dense" if decision.pruned else "")
    return decision.product_reason


@pytest.mark.parametrize("name", DENSE_LINEARS)
def test_products_of_another_form_stay_dense(name):
    assert unchanged(linear_graph(name)) == why.NO_GEOMETRY


def test_positions_of_too_many_dimensions_stay_dense():
    """Of the scope over positions alone: to the others, they are rows."""

    def graph():
        return joint_graph(nn.Linear(8, 16), torch.randn(2, 1, 3, 2, 2, 8, requires_grad=True))

    assert unchanged(graph(), rescale="feature_map") == why.NO_GEOMETRY
    assert [decision.product for decision in rewrite(graph())] == ["sparse"]


def test_a_dense_product_is_asked_for():
    assert unchanged(convolution_graph("conv2d"), product="dense") == why.ASKED_FOR


def test_other_dtypes_stay_dense():
    assert "dtype" in unchanged(convolution_graph("conv2d", torch.float16))


def test_layers_that_are_not_pruned_have_no_product():
    assert unchanged(convolution_graph("conv2d"), exclude="*") == ""


def test_whole_channels_are_a_smaller_dense_product():
    gm = convolution_graph("conv2d")
    (decision,) = rewrite(gm, structure="channel")
    assert find(gm, PRUNED_INPUT_GRAD) == []
    assert (decision.product, decision.product_reason) == ("dense", why.WHOLE_CHANNELS)


def test_a_pruned_gradient_with_another_reader_stays():
    gm = convolution_graph("conv2d")
    config = SDGPConfig(**SPARSE)
    prune_input_grads(gm.graph, config)
    (pruned,) = find(gm, PRUNE_NM)
    output = gm.graph.output_node()
    output.args = ((*output.args[0], pruned),)
    skip_zeros(gm.graph, config)
    assert find(gm, PRUNED_INPUT_GRAD) == []
    assert output in pruned.users


# Statistics


@pytest.mark.parametrize("settings", [{}, {"prune": "random"}, {"rescale": "channel"}])
def test_statistics_are_those_of_the_values_that_are_multiplied(settings):
    """What is recorded is the same, whatever multiplies."""
    recorded = []
    for product in ("dense", "sparse"):
        gm = joint_graph(Block(), torch.randn(2, 3, 9, 9))
        inputs = random_inputs(gm)
        rewrite(gm, product=product, **settings)
        expected = outputs(gm, inputs)
        record_statistics(gm.graph, "key")
        gm.recompile()
        torch.manual_seed(0)
        values = run(gm, inputs)
        (node,) = find(gm, RECORD)
        recorded.append(([values[total.name] for total in node.args[0]], node.args[3]))
        for mine, other in zip(outputs(gm, inputs), expected, strict=True):
            assert torch.equal(mine, other)
    (dense, names), (sparse, same_names) = recorded
    assert names == same_names
    torch.testing.assert_close(sparse[-5:], dense[-5:], rtol=1e-4, atol=0)
    torch.testing.assert_close(sparse[:5], dense[:5], rtol=0, atol=0)
