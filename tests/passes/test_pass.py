"""Test the rewrite on edges, which node feeds which gradient, and on numbers."""

import operator

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sdgp_fx import SDGPConfig, capture
from sdgp_fx.kernels import reference
from sdgp_fx.kernels.op import CHANNEL_FACTOR, PRUNE_NM
from sdgp_fx.passes import decisions as why
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD, find_convolutions
from sdgp_fx.passes.decisions import decide
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from ..helpers.graphs import (
    backward_of,
    copy_graph,
    gradients,
    is_pruned,
    joint_graph,
    random_inputs,
    run,
)
from ..helpers.layers import (
    CONVOLUTIONS,
    Block,
    assert_same_form,
    convolution_graph,
    convolution_on,
)

CHANNEL = SDGPConfig(rescale="channel")
# Convolutions whose weight takes the factors of scope "channel".
FOLDED = [name for name in CONVOLUTIONS if name != "transposed grouped"]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rewrites_the_input_gradient_and_nothing_else(name):
    gm = convolution_graph(name)
    (before,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    grad_output, others = before.args[0], before.args[1:10]
    has_bias = before.args[10][2]

    (decision,) = prune_input_grads(gm.graph, SDGPConfig())
    assert (decision.pruned, decision.reason) == (True, "")

    input_grad, weight_grad, bias_grad = gradients(gm)
    half = backward_of(input_grad)
    assert half.args[0].target is PRUNE_NM
    assert half.args[0].args[:4] == (grad_output, None, 2, 4)
    assert half.args[1:] == (*others, [True, False, False])
    rest = backward_of(weight_grad)
    assert rest is not half
    assert rest.args == (grad_output, *others, [False, True, has_bias])
    assert (bias_grad is not None) == has_bias
    if has_bias:
        assert backward_of(bias_grad) is rest
    # The pruned gradient goes nowhere else, and the graph still returns the same three.
    assert list(half.args[0].users) == [half]
    returned = set(gm.graph.output_node().all_input_nodes)
    assert {input_grad, weight_grad} <= returned


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_same_numbers(name):
    gm = convolution_graph(name)
    inputs = random_inputs(gm)
    input_grad, weight_grad, bias_grad = (n and n.name for n in gradients(gm))
    (node,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    before = run(gm, inputs)
    prune_input_grads(gm.graph, SDGPConfig())
    gm.recompile()
    after = run(gm, inputs)

    assert torch.equal(after[weight_grad], before[weight_grad])
    if bias_grad:
        assert torch.equal(after[bias_grad], before[bias_grad])
    operands = [before[a.name] if isinstance(a, fx.Node) else a for a in node.args[:10]]
    operands[0] = reference.prune_nm(operands[0], None, 2, 4, "rescaled_magnitude", "group")
    expected = torch.ops.aten.convolution_backward(*operands, [True, False, False])[0]
    assert torch.equal(after[input_grad], expected)
    assert not torch.equal(after[input_grad], before[input_grad])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_input_gradient_is_conv2d_input_of_the_pruned_gradient(memory_format):
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    x = torch.randn(2, 8, 9, 9).to(memory_format=memory_format).requires_grad_()
    gm = joint_graph(layer, x)
    inputs = random_inputs(gm)
    prune_input_grads(gm.graph, SDGPConfig(n=1, prune="magnitude"))
    gm.recompile()
    values = run(gm, inputs)
    half = backward_of(gradients(gm)[0])
    dense = half.args[0].args[0]
    pruned = reference.prune_nm(values[dense.name], None, 1, 4, "magnitude", "group")
    expected = torch.nn.grad.conv2d_input(x.shape, values[half.args[2].name], pruned, 2, 1)
    torch.testing.assert_close(values[gradients(gm)[0].name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SDGPConfig(), CHANNEL])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_recorded_values_match_the_real_ones(name, config):
    gm = convolution_graph(name, torch.bfloat16)
    inputs = random_inputs(gm)
    prune_input_grads(gm.graph, config)
    gm.recompile()
    values = run(gm, inputs)
    for node in gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD):
        for new in (node, *node.all_input_nodes):
            assert_same_form(new.meta["val"], values[new.name])


# Factors of scope "channel" in the weight


def scaled_weight(weight):
    """Return the weight and the factors that a scaled weight is made of."""
    product, dtype = weight.args
    assert dtype == weight.meta["val"].dtype
    assert product.target is torch.ops.aten.mul.Tensor
    assert product.meta["val"].dtype == torch.float32
    own, factor = product.args
    while factor.target is not CHANNEL_FACTOR:
        factor = factor.args[0]
    return own, factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOLDED)
def test_weight_takes_the_factors_of_the_channels(name, dtype):
    gm = convolution_graph(name, dtype)
    (before,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    grad_output, x, weight, *others = before.args[:10]
    has_bias = before.args[10][2]
    prune_input_grads(gm.graph, CHANNEL)

    input_grad, weight_grad, _ = gradients(gm)
    half = backward_of(input_grad)
    pruned, same_x, scaled, *rest = half.args
    assert pruned.target is PRUNE_NM
    assert pruned.args == (grad_output, None, 2, 4, "magnitude", "channel", others[-1])
    own, factor = scaled_weight(scaled)
    assert (own, factor.args) == (weight, (grad_output, 2, 4))
    assert (same_x, rest) == (x, [*others, [True, False, False]])
    # Neither the factors nor the pruned gradient go anywhere else.
    assert list(scaled.users) == list(pruned.users) == [half]
    dense = backward_of(weight_grad)
    assert dense.args == (grad_output, x, weight, *others, [False, True, has_bias])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("conv2d", torch.float16),
        ("conv2d", torch.float64),
        ("transposed grouped", torch.float32),
    ],
)
def test_the_others_leave_the_factors_to_the_prune(name, dtype):
    gm = convolution_graph(name, dtype)
    (before,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    grad_output, *others = before.args[:10]
    prune_input_grads(gm.graph, CHANNEL)
    half = backward_of(gradients(gm)[0])
    settings = (2, 4, "rescaled_magnitude", "channel", others[-1])
    assert half.args[0].args == (grad_output, None, *settings)
    assert half.args[1:] == (*others, [True, False, False])
    assert not gm.graph.find_nodes(op="call_function", target=CHANNEL_FACTOR)


def input_gradients(name, dtype):
    """Return input gradients with the factors in the weight, in the gradient, and in float64."""
    gm = convolution_graph(name, dtype)
    inputs = random_inputs(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    others = [n.name for n in gradients(gm)[1:] if n]
    before = run(gm, inputs)
    prune_input_grads(gm.graph, CHANNEL)
    gm.recompile()
    after = run(gm, inputs)
    for other in others:
        assert torch.equal(after[other], before[other])

    def by_definition(dtype):
        grad_output, x, weight = (before[a.name].to(dtype) for a in node.args[:3])
        pruned = reference.prune_nm(grad_output, None, 2, 4, "rescaled_magnitude", "channel")
        operands = (pruned, x, weight, *node.args[3:10], [True, False, False])
        return torch.ops.aten.convolution_backward(*operands)[0]

    return after[gradients(gm)[0].name], by_definition(dtype), by_definition(torch.float64)


def relative_error(result, exact):
    return ((result - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", FOLDED)
def test_factors_in_the_weight_give_the_same_input_gradient(name):
    """They agree up to rounding w * f instead of g * f, 2**-24 each, and the sums of products."""
    folded, unfolded, _ = input_gradients(name, torch.float32)
    assert relative_error(folded, unfolded) < 2**-21


@pytest.mark.parametrize("name", FOLDED)
def test_factors_in_the_weight_are_as_exact_in_bfloat16(name):
    """One rounding to bfloat16, of the weight, takes the place of another, of the gradient."""
    folded, unfolded, exact = input_gradients(name, torch.bfloat16)
    assert relative_error(unfolded, exact) < 2**-7
    assert relative_error(folded, exact) < 1.5 * relative_error(unfolded, exact)


def test_a_channel_that_keeps_next_to_nothing_stays_finite():
    """A factor of 1e37, times a weight of 100, is infinite, and times 0 NaN."""
    layer = nn.Conv2d(8, 4, 1, bias=False)
    nn.init.constant_(layer.weight, 100.0)
    grad_output = torch.zeros(1, 4, 1, 2)
    grad_output[0, :, 0, 0] = torch.tensor([2.0, 2.0, 1.0, 0.0])
    grad_output[0, 2, 0, 1] = 1e-37
    gm = joint_graph(layer, torch.randn(1, 8, 1, 2, requires_grad=True))
    prune_input_grads(gm.graph, CHANNEL)
    gm.recompile()
    x = torch.randn(1, 8, 1, 2)
    values = run(gm, [layer.weight.detach(), x, grad_output])
    (factor,) = gm.graph.find_nodes(op="call_function", target=CHANNEL_FACTOR)
    assert (100 * values[factor.name]).isinf().any()
    assert values[gradients(gm)[0].name].isfinite().all()


def test_scaled_weight_keeps_the_strides():
    layer = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 7, 7).to(memory_format=torch.channels_last).requires_grad_()
    gm = joint_graph(layer, x)
    prune_input_grads(gm.graph, CHANNEL)
    scaled = backward_of(gradients(gm)[0]).args[2]
    own, _ = scaled_weight(scaled)
    assert scaled.meta["val"].stride() == own.meta["val"].stride() == layer.weight.stride()


# Selection of layers


def test_bias_taken_out_by_a_decomposition():
    """Graphs for a GPU have this form: the bias gradient is a sum of the dense gradient."""
    from torch._inductor.decomposition import select_decomp_table

    def without_bias(*args):
        mask = args[10]
        if not mask[2]:
            return NotImplemented
        gx, gw, _ = torch.ops.aten.convolution_backward(*args[:10], [mask[0], mask[1], False])
        return gx, gw, args[0].sum([0, *range(2, args[0].dim())])

    table = {**select_decomp_table(), CONVOLUTION_BACKWARD: without_bias}
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    gm = joint_graph(nn.Conv2d(8, 16, 3), x, decompositions=table)
    inputs = random_inputs(gm)
    before = run(gm, inputs)
    (decision,) = prune_input_grads(gm.graph, SDGPConfig())
    gm.recompile()
    after = run(gm, inputs)
    assert decision.pruned
    input_grad, weight_grad, bias_grad = gradients(gm)
    assert bias_grad is None
    assert is_pruned(input_grad)
    assert not is_pruned(weight_grad)
    (total,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    assert total.args[0] is backward_of(weight_grad).args[0]
    for node in (weight_grad, total):
        assert torch.equal(after[node.name], before[node.name])


def test_input_gradient_only():
    """The weights are frozen, so there is nothing to split off."""
    layer = nn.Conv2d(8, 16, 3).requires_grad_(False)
    gm = joint_graph(layer, torch.randn(2, 8, 7, 7, requires_grad=True))
    (decision,) = prune_input_grads(gm.graph, SDGPConfig())
    assert decision.pruned
    (half,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    assert half.args[0].target is PRUNE_NM


def test_decisions_reasons_and_names():
    decisions = prune_input_grads(joint_graph(Block(), torch.randn(1, 3, 9, 9)).graph, SDGPConfig())
    assert [(d.module, d.pruned, d.reason) for d in decisions] == [
        ("", True, ""),
        ("grouped", False, why.NOT_A_MULTIPLE),
        ("odd.back", True, ""),
        ("odd.six", False, why.NOT_A_MULTIPLE),
        ("body.2", False, why.DEPTHWISE),
        ("body.0", True, ""),
        ("stem", False, why.NO_INPUT_GRADIENT),
    ]
    grouped = decisions[1]
    assert grouped.grad_output_shape == (1, 16, 3, 3)
    assert (grouped.weight_shape, grouped.groups, grouped.transposed) == ((16, 2, 1, 1), 8, False)


def test_names_in_a_function_around_the_model():
    model = Block()

    def loss(x):
        return model(x).sum()

    decisions = prune_input_grads(joint_graph(loss, torch.randn(1, 3, 9, 9)).graph, SDGPConfig())
    modules = {name for name, _ in model.named_modules()}
    assert {d.module for d in decisions} <= modules
    assert "odd.back" in {d.module for d in decisions}


def test_include_and_exclude():
    gm = joint_graph(Block(), torch.randn(1, 3, 9, 9))
    config = SDGPConfig(include="body.*,odd.*", exclude="odd.back")
    reasons = {d.module: d.reason for d in prune_input_grads(gm.graph, config)}
    assert reasons["body.0"] == ""
    assert reasons["odd.back"] == reasons["grouped"] == reasons[""] == why.EXCLUDED
    assert reasons["stem"] == why.NO_INPUT_GRADIENT


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.float32, ""),
        ("cuda", torch.float64, why.DTYPE),
        ("cpu", torch.float64, ""),
        ("cpu", torch.float8_e5m2, why.DTYPE),
    ],
)
def test_dtypes(device, dtype, reason):
    graph, outputs = convolution_on(device, dtype, (2, 8, 5, 5), 4)
    backward = outputs[0].args[0]
    (decision,) = prune_input_grads(graph, SDGPConfig())
    assert decision.reason == reason
    assert (outputs[0].args[0] is backward) == bool(reason)


@pytest.mark.parametrize(
    "make", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d], ids=lambda make: make.__name__
)
def test_a_complex_convolution_is_dense(make):
    """It is three real ones, of its real part, its imaginary part and their sum."""
    layer = make(8, 8, 3, dtype=torch.complex64)
    shape = (2, 8, *[5] * (layer.weight.dim() - 2))
    gm = joint_graph(layer, torch.randn(shape, dtype=torch.complex64, requires_grad=True))
    before = gm.graph.python_code("self").src
    decisions = prune_input_grads(gm.graph, SDGPConfig())
    assert [d.reason for d in decisions] == [why.DTYPE] * 3
    assert gm.graph.python_code("self").src == before


class Sized(nn.Module):
    """A convolution whose settings are arguments."""

    def __init__(self, transposed=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.randn(16, 8, 3, 3))
        self.transposed = transposed

    def forward(self, x, channels=None, groups=1, **settings):
        x = self.stem(x)
        if self.transposed:
            return nn.functional.conv_transpose2d(x, self.weight[:8], **settings)
        weight = self.weight[:channels, : 8 // groups]
        return nn.functional.conv2d(x, weight, groups=groups, **settings)


def gradients_of_stem(model, calls, options):
    """Return the stem's gradient for every call of one model, compiled for symbolic sizes."""
    torch._dynamo.reset()
    backend = "aot_eager" if options is None else "sdgp"
    run = torch.compile(model, backend=backend, options=options, dynamic=True)
    results = []
    for settings in calls:
        model.zero_grad()
        run(torch.ones(2, 3, 9, 9), **settings).sin().sum().backward()
        results.append(model.stem.weight.grad.clone())
    return results


@pytest.mark.parametrize("structure", ["element", "channel"])
@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([{"groups": 2}, {"groups": 4}], why.GROUPS_NOT_STATIC),
        ([{"channels": 16}, {"channels": 12}, {"channels": 6}], why.NOT_STATIC),
    ],
)
@pytest.mark.filterwarnings("ignore:sdgp pruned nothing")
def test_numbers_that_are_not_known_leave_a_layer_dense(calls, reason, structure):
    model = Sized()
    options = {"sdgp.inner": "aot_eager", "sdgp.structure": structure}
    with capture() as captured:
        results = gradients_of_stem(model, calls, options)
    assert [g.decisions[0].reason for g in captured] == [reason] * len(captured)
    dense = gradients_of_stem(model, calls, None)
    for result, expected in zip(results, dense, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("layers", ["all", "profitable"])
@pytest.mark.parametrize("structure", ["element", "channel"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.filterwarnings("ignore:sdgp pruned nothing")
def test_symbolic_strides_and_paddings_are_pruned_right(transposed, structure, layers):
    """Each call is compared with a graph of its own, without symbols."""
    model = Sized(transposed)
    calls = [{"stride": 2, "padding": 1}, {"stride": 3, "padding": 2}]
    options = {"sdgp.inner": "aot_eager", "sdgp.structure": structure, "sdgp.layers": layers}
    with capture() as captured:
        results = gradients_of_stem(model, calls, options)
    pays = layers == "all"
    assert [g.decisions[0].pruned for g in captured] == [pays] * len(captured)
    for settings, result in zip(calls, results, strict=True):
        torch._dynamo.reset()
        model.zero_grad()
        run = torch.compile(model, backend="sdgp", options=options, dynamic=False)
        run(torch.ones(2, 3, 9, 9), **settings).sin().sum().backward()
        torch.testing.assert_close(result, model.stem.weight.grad)


def test_symbolic_groups_are_named():
    gm = convolution_graph("conv2d")
    (node,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    (layer,) = find_convolutions(gm.graph)
    assert (layer.groups, layer.channels) == (1, 16)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        groups = gm.graph.placeholder("primals_9")
    groups.meta["val"] = symbol = ShapeEnv().create_unbacked_symint()
    node.update_arg(9, groups)
    (layer,) = find_convolutions(gm.graph)
    decision = decide(layer, [""], SDGPConfig(), in_backward=True)
    assert (decision.reason, decision.groups) == (why.GROUPS_NOT_STATIC, str(symbol))


@pytest.mark.parametrize("config", [SDGPConfig(n=4), SDGPConfig(m=32), SDGPConfig(include="no")])
def test_leaves_alone(config):
    gm = convolution_graph("conv2d")
    before = gm.graph.python_code("self").src
    (decision,) = prune_input_grads(gm.graph, config)
    assert not decision.pruned
    assert decision.reason
    assert gm.graph.python_code("self").src == before


def test_leaves_other_graphs_alone():
    gm = joint_graph(nn.Linear(8, 8), torch.randn(2, 8, requires_grad=True))
    before = gm.graph.python_code("self").src
    assert prune_input_grads(gm.graph, SDGPConfig()) == []
    assert gm.graph.python_code("self").src == before


@pytest.mark.parametrize("config", [SDGPConfig(), SDGPConfig(prune="mvue"), CHANNEL])
def test_idempotent(config):
    gm = joint_graph(Block(), torch.randn(1, 3, 9, 9))
    first = prune_input_grads(gm.graph, config)
    once = gm.graph.python_code("self").src
    assert prune_input_grads(gm.graph, config) == first
    assert gm.graph.python_code("self").src == once


@pytest.mark.parametrize("config", [SDGPConfig(), CHANNEL])
def test_idempotent_with_frozen_weights(config):
    layer = nn.Conv2d(8, 16, 3).requires_grad_(False)
    gm = joint_graph(layer, torch.randn(2, 8, 7, 7, requires_grad=True))
    first = prune_input_grads(gm.graph, config)
    assert prune_input_grads(gm.graph, config) == first
    assert len(gm.graph.find_nodes(op="call_function", target=PRUNE_NM)) == 1


def test_new_nodes_belong_to_the_backward_of_their_layer():
    gm = joint_graph(Block(), torch.randn(1, 3, 9, 9))
    prune_input_grads(gm.graph, SDGPConfig(prune="random"))
    for node in gm.graph.find_nodes(op="call_function", target=PRUNE_NM):
        (half,) = node.users
        for new in (node, node.args[1], half):
            assert new.meta["partitioner_tag"] == "is_backward"
            assert new.meta["fwd_nn_module_stack"] == half.meta["fwd_nn_module_stack"]


def test_factors_belong_to_the_backward_of_their_layer():
    gm = joint_graph(Block(), torch.randn(1, 3, 9, 9))
    old = set(gm.graph.nodes)
    prune_input_grads(gm.graph, CHANNEL)
    halves = [n.args[0] for n in gm.graph.nodes if n.target is operator.getitem and is_pruned(n)]
    assert len(halves) == 3
    for half in halves:
        new = [half.args[2]]
        while new[-1].target is not CHANNEL_FACTOR:
            (before,) = set(new[-1].all_input_nodes) - old
            new.append(before)
        for node in new:
            assert node.meta["partitioner_tag"] == "is_backward"
            assert node.meta["fwd_nn_module_stack"] == half.meta["fwd_nn_module_stack"]


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_every_layer_has_a_seed_of_its_own_from_one_draw(prune):
    gm = joint_graph(Block(), torch.randn(1, 3, 9, 9))
    prune_input_grads(gm.graph, SDGPConfig(prune=prune))
    pruned = gm.graph.find_nodes(op="call_function", target=PRUNE_NM)
    draws = {node.args[1].args[0] for node in pruned}
    assert len(draws) == 1
    assert draws.pop().target is torch.ops.aten.randint.default
    parts = [node.args[1].args[1:] for node in pruned]
    assert parts == [(0, i, i + 1) for i in range(len(pruned))]
    gm.recompile()
    values = run(gm, random_inputs(gm))
    assert len({int(values[node.args[1].name]) for node in pruned}) == len(pruned) == 3


def test_functions_without_numbers_draw_nothing():
    gm = convolution_graph("conv2d")
    prune_input_grads(gm.graph, SDGPConfig())
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.randint.default)


def test_a_copy_of_the_graph_is_rewritten_alike():
    gm = convolution_graph("conv2d")
    copy = copy_graph(gm)
    assert prune_input_grads(gm.graph, SDGPConfig()) == prune_input_grads(copy.graph, SDGPConfig())


def test_module_called_twice_is_two_layers():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    gm = joint_graph(
        nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.ReLU(), layer), torch.randn(1, 3, 5, 5)
    )
    decisions = prune_input_grads(gm.graph, SDGPConfig())
    assert [d.pruned for d in decisions] == [True, True, False]
    assert len(gm.graph.find_nodes(op="call_function", target=PRUNE_NM)) == 2
    assert prune_input_grads(gm.graph, SDGPConfig()) == decisions
