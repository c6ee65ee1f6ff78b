"""Test what is pruned: the backward of a joint graph, and nothing else that computes gradients."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.func import functional_call, grad
from torch.nn import functional as F

import sdgp_fx
from sdgp_fx import SDGPConfig
from sdgp_fx.kernels import reference
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes import decisions as why
from sdgp_fx.passes.backward import find_parts
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from ..helpers.graphs import joint_graph

EAGER = {"sdgp.inner": "aot_eager", "sdgp.targets": "conv,linear"}
BOTH = SDGPConfig(targets="conv,linear")
ALL = SDGPConfig(targets="conv,linear", gradients="all")
both_kinds = pytest.mark.parametrize("kind", ["conv", "linear"])


def make(kind):
    """Return a smooth network of float64 and an input."""
    if kind == "conv":
        layers = nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 1)
        return nn.Sequential(*layers).double(), torch.randn(2, 4, 7, 7).double()
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
    return nn.Sequential(*layers).double(), torch.randn(6, 4).double()


def compiled(function, backend="sdgp", **options):
    torch._dynamo.reset()
    options = {**EAGER, **options} if backend == "sdgp" else None
    return torch.compile(function, backend=backend, options=options)


def make_penalty(net, v=None):
    """Return the gradient penalty of a network, or that of its Hessian times v."""

    def inner(parameters, x):
        gradient = grad(lambda x: functional_call(net, parameters, (x,)).sum())(x)
        return gradient if v is None else (gradient * v).sum()

    def penalty(parameters, x):
        gradient = inner(parameters, x) if v is None else grad(inner, argnums=1)(parameters, x)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()

    return penalty


def value_and_gradients(function, net, x):
    parameters = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    value = function(parameters, x)
    value.backward()
    gradients = {k: p.grad for k, p in parameters.items() if p.grad is not None}
    return value.detach(), gradients


# Gradients that the compiled function takes


def conv2d_input(gradient, weight):
    return torch.nn.grad.conv2d_input((2, 4, 10, 10), weight, gradient)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.filterwarnings("ignore:sdgp pruned nothing")
def test_an_input_gradient_that_is_the_forward_is_dense(is_trained):
    gradient = torch.randn(2, 8, 8, 8)
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    with torch.set_grad_enabled(is_trained):
        expected = conv2d_input(gradient, weight)
        assert torch.equal(compiled(conv2d_input)(gradient, weight), expected)
        all_of_them = compiled(conv2d_input, **{"sdgp.gradients": "all"})(gradient, weight)
    pruned = reference.prune_nm(gradient, None, 2, 4, "rescaled_magnitude", "group")
    torch.testing.assert_close(all_of_them, conv2d_input(pruned, weight))


@both_kinds
def test_a_gradient_without_a_backward_is_dense(kind):
    net, x = make(kind)
    saliency = grad(lambda x: net(x).sum())
    with torch.no_grad():
        assert torch.equal(compiled(saliency)(x), compiled(saliency, "aot_eager")(x))
        pruned = compiled(saliency, **{"sdgp.gradients": "all"})(x)
        assert not torch.allclose(pruned, saliency(x))


@both_kinds
def test_a_training_step_of_torch_func_asks_for_it(kind):
    net, x = make(kind)
    parameters = {k: p.detach() for k, p in net.named_parameters()}
    step = grad(lambda parameters, x: functional_call(net, parameters, (x,)).square().sum())
    dense = compiled(step, "aot_eager")(parameters, x)
    for name, value in compiled(step)(parameters, x).items():
        assert torch.equal(value, dense[name])
    result = compiled(step, **{"sdgp.gradients": "all"})(parameters, x)
    net.zero_grad()
    compiled(net)(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(result[name], parameter.grad)
    assert not torch.allclose(result["0.weight"], dense["0.weight"])


@both_kinds
@pytest.mark.parametrize("is_second", [False, True])
def test_a_penalty_is_exact_and_its_derivative_is_pruned_in_the_layers_alone(kind, is_second):
    net, x = make(kind)
    penalty = make_penalty(net, torch.randn_like(x) if is_second else None)
    value, dense = value_and_gradients(compiled(penalty, "aot_eager"), net, x)
    pruned_value, pruned = value_and_gradients(compiled(penalty), net, x)
    assert torch.equal(pruned_value, value)
    assert not torch.allclose(pruned["0.weight"], dense["0.weight"])
    # With the layers excluded nothing else differs: second derivatives stay dense.
    with pytest.warns(UserWarning, match="gradient taken inside the compiled function"):
        excluded_value, excluded = value_and_gradients(
            compiled(penalty, **{"sdgp.exclude": "*"}), net, x
        )
    assert torch.equal(excluded_value, value)
    assert excluded.keys() == dense.keys()
    for name, gradient in excluded.items():
        assert torch.equal(gradient, dense[name])


@both_kinds
@pytest.mark.parametrize("is_second", [False, True])
def test_decisions_of_a_penalty(kind, is_second):
    net, x = make(kind)
    penalty = make_penalty(net, torch.randn_like(x) if is_second else None)
    gm = joint_graph(penalty, dict(net.named_parameters()), x)
    decisions = prune_input_grads(gm.graph, BOTH)
    reasons = {why.TAKEN_INSIDE, why.NO_INPUT_GRADIENT, ""}
    assert {d.reason for d in decisions} == reasons
    assert [d.module.split(".")[-1] for d in decisions if d.pruned] == ["2"]
    inside = {d.module.split(".")[-1] for d in decisions if d.reason == why.TAKEN_INSIDE}
    assert inside <= ({"", "0", "2", "4"} if is_second else {"0", "2", "4"})
    assert prune_input_grads(gm.graph, BOTH) == decisions
    # With "all", what is taken inside is pruned as well.
    gm = joint_graph(penalty, dict(net.named_parameters()), x)
    assert {d.reason for d in prune_input_grads(gm.graph, ALL)} == reasons - {why.TAKEN_INSIDE}


@both_kinds
def test_gradients_of_torch_autograd_inside(kind):
    """Dynamo traces `torch.autograd.grad` with an option."""
    net, x = make(kind)
    parameters = list(net.parameters())

    def step(x):
        return torch.autograd.grad(net(x).square().sum(), parameters)

    expected = step(x)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        dense = compiled(step)(x)
        pruned = compiled(step, **{"sdgp.gradients": "all"})(x)
    torch.testing.assert_close(dense, expected)
    assert not torch.allclose(pruned[0], expected[0])
    torch.testing.assert_close(pruned[-2], expected[-2])


# What belongs to the backward, however it has come there


class Constant(Function):
    """A function whose gradient does not depend on what flows back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones_like(gradient)


@both_kinds
def test_a_gradient_that_reads_no_tangent_belongs_to_the_backward(kind):
    net, x = make(kind)
    gm = joint_graph(lambda x: Constant.apply(net(x)), x)
    assert [d.module for d in prune_input_grads(gm.graph, BOTH) if d.pruned] == ["4", "2"]


@both_kinds
def test_a_node_without_a_tag_belongs_to_the_backward(kind):
    net, x = make(kind)
    gm, expected = joint_graph(net, x), prune_input_grads(joint_graph(net, x).graph, BOTH)
    for node in gm.graph.nodes:
        node.meta.pop("partitioner_tag", None)
    assert prune_input_grads(gm.graph, BOTH) == expected
    assert [d.pruned for d in expected] == [True, True, False]


class ConvolutionFunction(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return (
            torch.nn.grad.conv2d_input(x.shape, weight, gradient, padding=1),
            torch.nn.grad.conv2d_weight(x, weight.shape, gradient, padding=1),
        )


class LinearFunction(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


class Own(nn.Module):
    """A layer with a backward of its own."""

    def __init__(self, kind, function=None):
        super().__init__()
        is_linear = kind == "linear"
        self.function = function or (LinearFunction if is_linear else ConvolutionFunction)
        self.weight = nn.Parameter(torch.randn((8, 8) if is_linear else (8, 8, 3, 3)))

    def forward(self, x):
        return self.function.apply(x, self.weight)


@both_kinds
@pytest.mark.parametrize("structure", ["element", "channel"])
def test_layers_with_a_backward_of_their_own_are_one_layer_each(kind, structure):
    config = SDGPConfig(targets="conv,linear", structure=structure)
    net = nn.Sequential(Own(kind), Own(kind), nn.ReLU(), Own(kind))
    x = torch.randn((4, 8) if kind == "linear" else (2, 8, 5, 5))
    gm = joint_graph(net, x)
    decisions = prune_input_grads(gm.graph, config)
    assert [(d.kind, d.reason) for d in decisions] == [
        (kind, ""),
        (kind, ""),
        (kind, why.NO_INPUT_GRADIENT),
    ]
    assert all(d.layer.has_weight_grad for d in decisions)
    assert [d.layer.grad_output.meta["val"].shape[1] for d in decisions] == [8] * 3
    once = str(gm.graph)
    assert prune_input_grads(gm.graph, config) == decisions
    assert str(gm.graph) == once


def test_weight_gradients_of_their_own_are_dense():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Own("conv"), nn.ReLU(), Own("conv")).double()
    x, results = torch.randn(2, 3, 5, 5).double(), []
    for backend in ("aot_eager", "sdgp"):
        net.zero_grad()
        compiled(net, backend)(x).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    dense, pruned = results
    assert torch.equal(pruned[-1], dense[-1])
    assert not torch.allclose(pruned[-2], dense[-2])


class FrozenBeside(nn.Module):
    """Two convolutions of one shape get the same gradient; one has a weight's, one an input's."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.frozen = nn.Conv2d(8, 8, 1, bias=False).requires_grad_(False)
        self.first = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x, y):
        return self.frozen(self.stem(x)) + self.first(y)


def test_two_layers_are_not_the_halves_of_one():
    inputs = torch.randn(2, 3, 5, 5), torch.randn(2, 8, 5, 5)
    decisions = prune_input_grads(joint_graph(FrozenBeside(), *inputs).graph, BOTH)
    assert {d.module: d.reason for d in decisions} == {
        "frozen": "",
        "first": why.NO_INPUT_GRADIENT,
        "stem": why.NO_INPUT_GRADIENT,
    }


# Compiled autograd, which compiles the backward once more


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sdgp.exclude": "2,4"},
        {"sdgp.structure": "channel"},
        {"sdgp.gradients": "all", "sdgp.structure": "channel", "sdgp.targets": "conv"},
        {"sdgp.rescale": "channel"},
    ],
)
@both_kinds
@pytest.mark.filterwarnings("ignore:sdgp pruned nothing")
def test_compiled_autograd_prunes_nothing_twice(kind, options):
    net, x = make(kind)
    results = []
    for with_compiled_autograd in (False, True):
        net.zero_grad()
        run = compiled(lambda x: net(x).square().sum(), **options)
        if with_compiled_autograd:
            compiler = torch.compile(backend="sdgp", options={**EAGER, **options})
            with torch._dynamo.compiled_autograd._enable(compiler):
                run(x).backward()
        else:
            run(x).backward()
        results.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@both_kinds
def test_compiled_autograd_does_not_prune_what_ran_in_eager_mode(kind):
    net, x = make(kind)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="sdgp", options=EAGER)):
        net(x).square().sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# Branches of torch.cond


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return torch.cond(
            x.sum() > 0, lambda x: self.one(x).tanh(), lambda x: self.last(self.other(x)), (x,)
        )


def branches():
    """Return a network with branches, and an input, as stock Inductor can compile them."""
    net = Branches().to(memory_format=torch.channels_last)
    return net, torch.randn(2, 3, 7, 7).to(memory_format=torch.channels_last)


def test_layers_in_branches_are_decided_by_the_rules():
    net, x = branches()
    gm = joint_graph(net, x)
    decisions = prune_input_grads(gm.graph, BOTH)
    reasons = [d.reason for d in decisions]
    assert reasons == [why.NO_INPUT_GRADIENT, "", "", why.NOT_A_MULTIPLE]
    assert prune_input_grads(gm.graph, BOTH) == decisions
    pruned = []
    for part in find_parts(gm.graph):
        part.graph.lint()
        found = part.graph.find_nodes(op="call_function", target=PRUNE_NM)
        pruned.append(len(found))
        for node in found:
            (half,) = node.users
            assert half.target is CONVOLUTION_BACKWARD
            assert half.args[10] == [True, False, False]
    assert sorted(pruned) == [0, 0, 0, 1, 1]


def test_a_branch_by_itself_is_left_to_the_graph_around_it():
    """Inductor hands it to the pass ahead of that."""
    net, x = branches()
    gm = joint_graph(net, x)
    _, *inner = find_parts(gm.graph)
    backward = [part.graph for part in inner if part.backward]
    assert len(backward) == 2
    for graph in backward:
        assert graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
        assert prune_input_grads(graph, ALL) == []
        assert not graph.find_nodes(op="call_function", target=PRUNE_NM)


def stem_gradient(net, x):
    """Compute the gradient of the stem by hand, with a pruned gradient in the branch."""
    hidden = net.stem(x).detach()
    y = hidden.requires_grad_()
    if hidden.sum() > 0:
        output = net.one(y).tanh()
        gradient = torch.autograd.grad(output.square().sum(), output)[0] * (1 - output**2)
        layers = [net.one]
    else:
        output = net.last(net.other(y))
        (gradient,) = torch.autograd.grad(output.square().sum(), output)
        layers = [net.last, net.other]
    for layer in layers:
        if layer.out_channels % 4 == 0:
            gradient = reference.prune_nm(gradient, None, 2, 4, "rescaled_magnitude", "group")
        padding = layer.padding
        shape = (len(x), layer.in_channels, *hidden.shape[2:])
        gradient = torch.nn.grad.conv2d_input(shape, layer.weight, gradient, padding=padding)
    return torch.nn.grad.conv2d_weight(x, net.stem.weight.shape, gradient)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("sign", [1, -1])
def test_both_compilers_prune_in_branches(inner, sign):
    net, x = branches()
    with torch.no_grad():
        net.stem.bias += 10 * sign
    with warnings.catch_warnings(), sdgp_fx.capture() as captured:
        warnings.filterwarnings("error", message="sdgp")
        compiled(net, **{"sdgp.inner": inner})(x).square().sum().backward()
    (graph,) = captured
    assert [d.pruned for d in graph.decisions] == [False, True, True, False]
    assert graph.diff(context=0).count("torch.ops.sdgp.prune_nm") == 2
    torch.testing.assert_close(net.stem.weight.grad, stem_gradient(net, x), rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    """A branch in a branch; with a weight that is computed on the way, and one of two layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.inner = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.tied, self.twin = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.twin.weight = self.tied.weight

    def forward(self, x):
        def outer(x):
            return torch.cond(x.mean() > 0, self.inner[0], self.inner[1], (x,))

        x = self.stem(x)
        return torch.cond(x.sum() > 0, outer, lambda x: self.tied(self.scaled(x)), (x,))


def test_layers_in_branches_have_the_names_of_their_weights_owners():
    with sdgp_fx.capture() as captured:
        compiled(Nested())(torch.randn(2, 3, 5, 5)).square().sum().backward()
    (graph,) = captured
    names = {d.module for d in graph.decisions if d.pruned}
    assert names == {"inner.0", "inner.1", why.UNKNOWN}
    assert sum(d.module == why.UNKNOWN for d in graph.decisions) == 2


@pytest.mark.parametrize("options", [{"sdgp.exclude": "one"}, {"sdgp.include": "other,last"}])
def test_rules_select_layers_in_branches(options):
    net, x = branches()
    with warnings.catch_warnings(), sdgp_fx.capture() as captured:
        warnings.filterwarnings("error", message="sdgp")
        compiled(net, **options)(x).square().sum().backward()
    (graph,) = captured
    reasons = {d.module: d.reason for d in graph.decisions}
    assert reasons.pop("stem") in (why.NO_INPUT_GRADIENT, why.EXCLUDED)
    assert reasons == {"one": why.EXCLUDED, "other": why.NOT_A_MULTIPLE, "last": ""}
