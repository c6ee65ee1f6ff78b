"""Test linear layers in the joint graph: found by structure, and fed with the pruned gradient."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from sdgp_fx import SDGPConfig, capture, explain
from sdgp_fx.kernels import reference
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes import decisions as why
from sdgp_fx.passes import linears
from sdgp_fx.passes.linears import MM
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from ..helpers.graphs import copy_graph, joint_graph, random_inputs, run
from ..helpers.layers import LINEARS, PRODUCTS, linear_graph, linear_products

LINEAR = SDGPConfig(targets="linear")


def pruned_and_run(name, rescale, dtype=torch.float32):
    """Return the rewritten graph of a layer, its inputs, and the values of its nodes."""
    gm = linear_graph(name, dtype)
    inputs = random_inputs(gm)
    prune_input_grads(gm.graph, SDGPConfig(targets="linear", rescale=rescale))
    gm.recompile()
    return gm, inputs, run(gm, inputs)


def readers_of(pruned):
    """Return the products that read a pruned gradient or a view of it."""
    readers = list(pruned.users)
    for node in readers:
        readers += [] if node.target in PRODUCTS else node.users
    return [node for node in readers if node.target in PRODUCTS]


def prunes(gm):
    return gm.graph.find_nodes(op="call_function", target=PRUNE_NM)


@pytest.mark.parametrize("name", LINEARS)
def test_rewrites_the_input_gradient_and_nothing_else(name):
    gm = linear_graph(name)
    before = {node: node.args for node in gm.graph.nodes}
    (decision,) = prune_input_grads(gm.graph, LINEAR)
    assert (decision.kind, decision.pruned, decision.reason) == ("linear", True, "")

    (pruned,) = prunes(gm)
    assert pruned.args[0].meta["val"].shape[1] == 16
    changed = [node for node in gm.graph.nodes if node in before and node.args != before[node]]
    (input_grad,) = changed
    assert input_grad in linear_products(gm)
    assert input_grad in readers_of(pruned)
    assert len(linear_products(gm)) == (2 if LINEARS[name][0].weight.requires_grad else 1)


@pytest.mark.parametrize("name", LINEARS)
def test_same_numbers(name):
    gm = linear_graph(name)
    inputs = random_inputs(gm)
    before = run(gm, inputs)
    prune_input_grads(gm.graph, LINEAR)
    gm.recompile()
    after = run(gm, inputs)

    (pruned,) = prunes(gm)
    (reader,) = readers_of(pruned)
    dense = after[pruned.args[0].name]
    expected = reference.prune_nm(dense, None, 2, 4, "rescaled_magnitude", "group")
    assert torch.equal(after[pruned.name], expected)
    weight = LINEARS[name][0].weight
    weight = inputs[[tuple(x.shape) for x in inputs].index(tuple(weight.shape))]
    product = after[reader.name]
    input_grad = product.T if name == "column-major" else product
    expected = expected.movedim(1, -1) @ weight
    torch.testing.assert_close(input_grad, expected.view(input_grad.shape))
    for node in linear_products(gm):
        if node is not reader:
            assert torch.equal(after[node.name], before[node.name])


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("rescale", ["group", "feature_map", "channel"])
def test_idempotent(name, rescale):
    gm = linear_graph(name)
    config = SDGPConfig(targets="linear", rescale=rescale)
    decisions = prune_input_grads(gm.graph, config)
    once = copy_graph(gm)
    assert [d.pruned for d in prune_input_grads(gm.graph, config)] == [d.pruned for d in decisions]
    assert [node.format_node() for node in gm.graph.nodes] == [
        node.format_node() for node in once.graph.nodes
    ]


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("rescale", ["group", "feature_map", "channel"])
def test_recorded_values_match_the_real_ones(name, rescale):
    gm, _, values = pruned_and_run(name, rescale, torch.bfloat16)
    for node in linear_products(gm):
        for new in (node, *node.all_input_nodes):
            recorded, real = new.meta["val"], values[new.name]
            assert (recorded.shape, recorded.dtype) == (real.shape, real.dtype)
            assert recorded.stride() == real.stride()


def test_feature_map_is_over_the_positions_of_a_sample():
    gm, inputs, values = pruned_and_run("image", "feature_map")
    (pruned,) = prunes(gm)
    (tangent,) = [x for x in inputs if x.shape == (2, 3, 5, 16)]
    maps = tangent.permute(0, 3, 1, 2).contiguous()
    expected = reference.prune_nm(maps, None, 2, 4, "rescaled_magnitude", "feature_map")
    torch.testing.assert_close(values[pruned.name], expected)
    rows = next(
        node for node in linear_products(gm) if node.args[1].meta["val"].shape == (16, 8)
    ).args[0]
    torch.testing.assert_close(values[rows.name], expected.permute(0, 2, 3, 1).reshape(30, 16))


@pytest.mark.parametrize("name", ["positions", "batched", "batched image"])
def test_feature_map_of_symbolic_sizes(name):
    """The number of positions is not known when the graph is rewritten."""
    layer, shape = LINEARS[name]
    config = SDGPConfig(targets="linear", rescale="feature_map")
    results = []
    for dynamic in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        options = {f"sdgp.{k}": v for k, v in dataclasses.asdict(config).items()}
        options["sdgp.inner"] = "aot_eager"
        compiled = torch.compile(layer, backend="sdgp", options=options, dynamic=dynamic)
        results.append(torch.autograd.grad(compiled(x).sin().sum(), x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rescale", ["group", "feature_map", "channel"])
def test_one_vector(rescale):
    gm = joint_graph(nn.Linear(8, 16), torch.randn(8, requires_grad=True))
    config = SDGPConfig(targets="linear", rescale=rescale)
    (decision,) = prune_input_grads(gm.graph, config)
    assert decision.pruned
    assert decision.grad_output_shape == (1, 16)


def test_channel_folds_its_factor_into_the_weight():
    gm, inputs, values = pruned_and_run("positions", "channel")
    (pruned,) = prunes(gm)
    assert pruned.args[4] == "magnitude"
    (input_grad,) = pruned.users
    dense = values[pruned.args[0].name]
    (weight,) = [x for x in inputs if x.shape == (16, 8)]
    expected = reference.prune_nm(dense, None, 2, 4, "rescaled_magnitude", "channel") @ weight
    torch.testing.assert_close(values[input_grad.name], expected)


class Products(nn.Module):
    """Products of matrices, only one of them a linear layer."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        q = self.project(x)
        scores = torch.mm(q, x.t()).softmax(-1)
        return torch.addmm(q, scores, x) @ self.table


def test_leaves_other_products_alone():
    gm = joint_graph(Products(), torch.randn(8, 8, requires_grad=True))
    (decision,) = prune_input_grads(gm.graph, LINEAR)
    assert decision.module == "project"
    (pruned,) = prunes(gm)
    (input_grad,) = pruned.users
    assert input_grad.meta["fwd_source_fn_stack"][-1][1] is nn.Linear
    assert len(linear_products(gm)) == 8


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_attention_is_projections_alone(need_weights, frozen):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(not frozen)

    def attend(x):
        return attention(x, x, x, need_weights=need_weights)[0]

    gm = joint_graph(attend, torch.randn(3, 5, 8, requires_grad=True))
    decisions = prune_input_grads(gm.graph, LINEAR)
    assert sorted(d.weight_shape for d in decisions) == [(8, 8), (24, 8)]
    for pruned in prunes(gm):
        (input_grad,) = readers_of(pruned)
        assert input_grad.target is MM or frozen


class Subclass(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Direct(nn.Module):
    """Attention by torch.nn's function, with weights of its own, as attention pooling has it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, *_, need_weights):
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        return nn.functional.multi_head_attention_forward(
            *(x, x, x, 8, 2, None, biases, None, None, False, 0.0),
            *(self.out.weight, self.out.bias),
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            need_weights=need_weights,
        )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("make", [Subclass, Direct])
def test_projections_of_attention_in_any_form(make, need_weights):
    attention = Direct() if make is Direct else make(8, 2)
    stem = nn.Linear(8, 8)

    def attend(x):
        x = stem(x)
        return attention(x, x, x, need_weights=need_weights)[0]

    gm = joint_graph(attend, torch.randn(5, 3, 8))
    decisions = prune_input_grads(gm.graph, LINEAR)
    projections = [(8, 8)] * 4 if make is Direct else [(8, 8), (24, 8)]
    assert sorted(d.weight_shape for d in decisions if d.pruned) == projections
    assert [d.reason for d in decisions if not d.pruned] == [why.NO_INPUT_GRADIENT]
    for pruned in prunes(gm):
        (input_grad,) = readers_of(pruned)
        assert input_grad.target is MM


# Products of a matrix with itself


def pruned_rows(gradient):
    return reference.prune_nm(gradient, None, 2, 4, "rescaled_magnitude", "group")


SELF_PRODUCTS = {
    "rows": (lambda z: nn.functional.linear(z, z), (8, 12)),
    "square": (lambda z: nn.functional.linear(z, z), (8, 8)),
    "column-major": (lambda z: nn.functional.linear(z.t(), z.t()), (12, 8)),
    "transposed weight": (lambda z: nn.functional.linear(z, z.t()), (8, 8)),
    "transposed input": (lambda z: nn.functional.linear(z.t(), z), (8, 8)),
    "normalized": (lambda z: nn.functional.linear(*[nn.functional.normalize(z)] * 2), (8, 12)),
    "frozen weight": (lambda z: nn.functional.linear(z, z.detach()), (8, 8)),
}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", SELF_PRODUCTS)
def test_of_a_product_with_itself_the_input_gradient_alone_is_pruned(name, inner, is_transposed):
    """It reads grad_output as it is, and the weight gradient its transpose: by hand here.

    Args:
        is_transposed: The gradient comes to the layer as a transpose already.
    """
    function, shape = SELF_PRODUCTS[name]
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    size = shape[1] if name == "column-major" else shape[0]
    factor = torch.randn(size, size, dtype=torch.float64)

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return pruned_rows(gradient) @ weight, gradient.t() @ x

    def loss(z):
        y = function(z)
        return ((y.t() if is_transposed else y) * factor).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", ByHand.apply)
        (expected,) = torch.autograd.grad(loss(z), z)
    options = {"sdgp.targets": "linear", "sdgp.inner": inner}
    with capture() as captured:
        compiled = torch.compile(loss, backend="sdgp", options=options)(z)
        (result,) = torch.autograd.grad(compiled, z)
    torch.testing.assert_close(result, expected)
    assert [d.reason for d in captured[0].decisions] == [""]


@pytest.mark.parametrize("rescale", ["group", "channel"])
@pytest.mark.parametrize("structure", ["element", "channel"])
def test_a_product_with_itself_is_rewritten_once(structure, rescale):
    if structure == "channel" and rescale == "channel":
        pytest.skip("whole channels have one scope")
    config = SDGPConfig(targets="linear", structure=structure, rescale=rescale)
    z = torch.randn(8, 8, requires_grad=True)
    gm = joint_graph(lambda z: nn.functional.linear(z, z), z)
    (decision,) = prune_input_grads(gm.graph, config)
    assert decision.pruned
    once = str(gm.graph)
    assert prune_input_grads(gm.graph, config) == [decision]
    assert str(gm.graph) == once


def test_the_weight_gradient_of_a_product_with_itself_is_no_layer():
    z = torch.randn(8, 8, requires_grad=True)
    gm = joint_graph(lambda z: nn.functional.linear(z.detach(), z), z)
    assert [d.pruned for d in prune_input_grads(gm.graph, LINEAR)] in ([], [False])
    assert not prunes(gm)


# Layers that run without a gradient


class Distillation(nn.Module):
    """A student of any depth, and a frozen teacher after it, which reads what an input names."""

    def __init__(self, depth, reads_hidden):
        super().__init__()
        sizes = [8, *[16] * depth]
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        self.student = nn.Sequential(*layers)
        self.reads_hidden = reads_hidden
        width = 16 if reads_hidden and depth > 1 else 8
        self.teacher = nn.Sequential(nn.Linear(width, 16), nn.Linear(16, 16))
        self.teacher.requires_grad_(False)

    def forward(self, x):
        hidden = self.student[:-1](x)
        student = self.student[-1](hidden)
        with torch.no_grad():
            teacher = self.teacher(hidden if self.reads_hidden else x)
        return torch.mm(student, teacher.t()).sin()


@pytest.mark.parametrize("structure", ["element", "channel"])
@pytest.mark.parametrize("reads_hidden", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_runs_under_no_grad_after_a_layer_is_not_that_layer(depth, reads_hidden, structure):
    gm = joint_graph(Distillation(depth, reads_hidden), torch.randn(4, 8))
    config = SDGPConfig(targets="linear", structure=structure)
    decisions = prune_input_grads(gm.graph, config)
    expected = [(f"student.{i}", why.NO_INPUT_GRADIENT * (i == 0)) for i in reversed(range(depth))]
    assert [(d.module, d.reason) for d in decisions] == expected
    sizes = [8, *[16] * depth]
    inputs = [d.layer.input.meta["val"].shape[1] for d in decisions]
    assert inputs == sizes[-2::-1]
    again = prune_input_grads(gm.graph, config)
    assert again == decisions
    assert [d.layer.input for d in again] == [d.layer.input for d in decisions]


def test_a_complex_layer_is_dense():
    net = nn.Sequential(*[nn.Linear(8, 8, dtype=torch.complex64) for _ in range(2)])
    decisions, gm = decide(net, torch.randn(3, 8, dtype=torch.complex64), targets="linear")
    assert [reason for *_, reason in decisions] == [why.DTYPE, why.NO_INPUT_GRADIENT]
    assert not prunes(gm)


def test_a_gradient_is_known_by_both_of_its_operands():
    """Other products multiply by one of them, or by the input and by something else."""
    layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
    other = nn.Parameter(torch.randn(8, 8))

    def products(x):
        return layer(x) + x @ other + other @ x

    x = torch.randn(8, 8, requires_grad=True)
    gm = joint_graph(products, x)
    (decision,) = prune_input_grads(gm.graph, LINEAR)
    assert decision.pruned
    assert not decision.layer.has_weight_grad


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.body = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 16))
        self.conv = nn.Conv1d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(self.stem(x))
        return self.head(self.head.weight.mean() + self.conv(x.mT).mT)


def decide(model, x, **options):
    gm = joint_graph(model, x)
    decisions = prune_input_grads(gm.graph, SDGPConfig(**options))
    return [(d.module, d.kind, d.reason) for d in decisions], gm


def test_decisions_in_the_order_of_the_backward():
    x = torch.randn(3, 5, 8)
    linear = [
        ("head", "linear", ""),
        ("body.2", "linear", ""),
        ("body.0", "linear", why.NOT_A_MULTIPLE),
        ("stem", "linear", why.NO_INPUT_GRADIENT),
    ]
    conv = ("conv", "conv", "")
    assert decide(Mixed(), x, targets="linear")[0] == linear
    assert decide(Mixed(), x, targets="conv")[0] == [conv]
    assert decide(Mixed(), x, targets="conv,linear")[0] == [linear[0], conv, *linear[1:]]
    excluded, gm = decide(Mixed(), x, targets="linear", exclude="body.*,head")
    assert [reason for *_, reason in excluded[:3]] == [why.EXCLUDED] * 3
    assert not prunes(gm)


def test_one_output_is_not_depthwise():
    decisions, _ = decide(nn.Linear(8, 1), torch.randn(3, 8, requires_grad=True), targets="linear")
    assert decisions == [("", "linear", why.NOT_A_MULTIPLE)]


def test_a_module_called_twice_has_two_layers():
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8, requires_grad=True)
    decisions, gm = decide(lambda x: layer(layer(x).relu()), x, targets="linear")
    assert [reason for *_, reason in decisions] == ["", ""]
    assert len(prunes(gm)) == 2


def test_layers_without_a_backward_are_no_layers():
    """They are frozen ones before the first trained layer; the graph shows no other difference."""
    frozen = [nn.Linear(8, 8, bias=False).requires_grad_(False) for _ in range(3)]
    model = nn.Sequential(*frozen, nn.Linear(8, 8), nn.Linear(8, 8))
    decisions, _ = decide(model, torch.randn(3, 8), targets="linear")
    assert decisions == [("4", "linear", ""), ("3", "linear", why.NO_INPUT_GRADIENT)]


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_stochastic_functions_have_a_seed_for_each_layer(prune):
    x = torch.randn(3, 5, 8)
    _, gm = decide(Mixed(), x, targets="conv,linear", prune=prune)
    seeds = [node.args[1] for node in prunes(gm)]
    assert len({seed.args for seed in seeds}) == len(seeds) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    def step(x):
        with torch.autocast("cpu", dtype):
            return layer(x)

    layer = nn.Linear(8, 16)
    gm = joint_graph(step, torch.randn(3, 8, requires_grad=True))
    (decision,) = prune_input_grads(gm.graph, LINEAR)
    assert decision.pruned
    (pruned,) = prunes(gm)
    assert pruned.meta["val"].dtype == dtype


MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 64, "window_size": 2},
        **{"depths": (1, 2), "num_heads": (3, 6)},
    },
    "convnext_tiny": {"depths": (1, 1, 1, 1)},
    "mixer_s32_224": {"img_size": 64},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_of(name):
    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.create_model(name, num_classes=12, **MODELS[name])
    expected = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    options = {"sdgp.targets": "linear"}
    decisions = explain(model, torch.randn(2, 3, 64, 64), options=options)
    assert len(decisions) == len(expected)
    assert {d.module for d in decisions if d.pruned} == expected


def test_forward_and_last_weight_gradient_of_a_transformer():
    """The last layer's weight gradient is the only one without a pruned gradient in it."""
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=8, img_size=32, depth=2)
    x, results = torch.randn(2, 3, 32, 32), []
    for backend, options in (
        ("aot_eager", None),
        ("sdgp", {"sdgp.targets": "linear", "sdgp.inner": "aot_eager"}),
    ):
        torch._dynamo.reset()
        model.zero_grad()
        output = torch.compile(model, backend=backend, options=options)(x)
        output.square().sum().backward()
        results.append([output, model.head.weight.grad, model.blocks[1].mlp.fc2.weight.grad])
    (output, head, inner), (pruned_output, pruned_head, pruned_inner) = results
    assert torch.equal(pruned_output, output)
    assert torch.equal(pruned_head, head)
    assert not torch.equal(pruned_inner, inner)


def test_private_names_of_dynamo():
    """The search relies on a node of the forward naming the function it comes from."""
    gm = linear_graph("functional")
    (forward,) = [n for n in gm.graph.nodes if n.target is MM and "source_fn_stack" in n.meta]
    assert forward.meta["source_fn_stack"][-1][1] in linears._FUNCTIONS
    assert all(node.meta["seq_nr"] == forward.meta["seq_nr"] for node in linear_products(gm))
