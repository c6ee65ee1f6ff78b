"""Whole channels pruned: the choice held against loops, the graph against the definition."""

import itertools
import math

import pytest
import torch
from torch import nn

from sdgp_fx import SDGPConfig, explain
from sdgp_fx.kernels.channels import select_channels
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes import prune_input_grads as the_pass
from sdgp_fx.passes.channels import COST
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from . import test_linears, test_pass, test_statistics
from .definition import EagerSDGP
from .graphs import backward_of, copy_graph, gradients, joint_graph, random_inputs, run
from .test_statistics import assert_frequencies

CONVOLUTIONS = test_pass.CONVOLUTIONS
LINEARS = test_linears.LAYERS
PATTERNS = [(2, 4), (1, 4), (3, 8), (2, 16), (16, 32), (1, 1)]

# Sums of products in another order, 2**-24 each; of bfloat16, one rounding of values times factors
# and one of the result. Of the norm of a gradient.
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def always(prune="rescaled_magnitude", **settings):
    return SDGPConfig(structure="channel_always", prune=prune, **settings)


def chosen(norms, n, m, prune):
    """Lists of the channels that are kept and of their factors, by a loop over groups."""
    kept, factors = [], []
    for first in range(0, len(norms), m):
        group = norms[first : first + m]
        size = [math.inf if math.isnan(norm) else norm for norm in group]
        order = sorted(range(m), key=lambda i: (-math.isnan(group[i]), -size[i], i))[:n]
        kept += [first + i for i in order]
        part = sum(group[i] for i in order)
        factor = sum(group) / part if prune == "rescaled_magnitude" and part else 1.0
        factors += [factor if math.isfinite(factor) else 1.0] * n
    return kept, factors


def pruned(grad_output, n, m, prune, dim=1):
    """grad_output with zeros for the channels that are not kept, and the others scaled."""
    others = [d for d in range(grad_output.dim()) if d != dim]
    norms = grad_output.double().abs().sum(others).tolist()
    result = torch.zeros_like(grad_output).movedim(dim, 0)
    for channel, factor in zip(*chosen(norms, n, m, prune), strict=True):
        result[channel] = grad_output.movedim(dim, 0)[channel] * factor
    return result.movedim(0, dim)


def relative_error(result, exact):
    return ((result - exact).double().norm() / exact.double().norm()).item()


# The choice


def groups_of(m):
    """Norms in which there is something to get wrong, one group each."""
    generator = torch.Generator().manual_seed(m)
    normal = torch.randn(m, generator=generator).abs()
    special = normal.clone()
    special[-1], special[m // 2] = math.inf, math.nan
    single = torch.zeros(m)
    single[-1] = 1e-45
    return {
        "normal": normal,
        "ties": torch.randint(1, 3, (m,), generator=generator).float(),
        "equal": torch.ones(m),
        "zero": torch.zeros(m),
        "special": special,
        "single": single,
        "large": normal * 1e38,
        "descending": torch.arange(m, 0, -1).float(),
    }


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("prune", ["magnitude", "rescaled_magnitude"])
def test_choice(prune, n, m):
    for kind, norms in groups_of(m).items():
        index, factor = select_channels(norms, n, m, prune)
        kept, factors = chosen(norms.tolist(), n, m, prune)
        assert index.tolist() == kept, kind
        assert (factor is None) == (prune == "magnitude")
        if factor is not None and kind != "large":
            torch.testing.assert_close(factor, torch.tensor(factors), rtol=2**-20, atol=0, msg=kind)
        assert factor is None or factor.isfinite().all()


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_drawn_channels_are_n_different_ones_of_each_group(prune, n, m):
    generator = torch.Generator().manual_seed(0)
    norms = torch.cat(list(groups_of(m).values()))
    for _ in range(100):
        count = len(norms) if prune == "random" else len(norms) // m
        draw = torch.randint(2**63 - 1, (count,), generator=generator)
        index, factor = select_channels(norms, n, m, prune, draw)
        assert (index.view(-1, n) // m == torch.arange(len(norms) // m).unsqueeze(1)).all()
        assert len(set(index.tolist())) == len(index)
        assert factor is None or (factor >= 1 - 2**-20).all()
        assert factor is None or factor.isfinite().all()


@pytest.mark.parametrize("draw", [0, 2**63 - 2])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_least_and_largest_draw(n, m, draw):
    for norms in groups_of(m).values():
        index, factor = select_channels(norms, n, m, "mvue", torch.tensor([draw]))
        assert len(set(index.tolist())) == n
        assert factor.isfinite().all()


def test_mvue_prunes_what_is_not_finite_by_magnitude():
    norms = groups_of(8)["special"]
    index, factor = select_channels(norms, 2, 8, "mvue", torch.tensor([2**62]))
    assert index.tolist() == [4, 7]
    assert (factor == 1).all()


def draws(row, n, prune):
    """For many groups with the norms of row: which are kept, and the factors, 0 elsewhere."""
    m, count = len(row), test_statistics.DRAWS
    norms = torch.tensor(row).abs().repeat(count)
    generator = torch.Generator().manual_seed(n + m)
    size = len(norms) if prune == "random" else count
    numbers = torch.randint(2**63 - 1, (size,), generator=generator)
    index, factor = select_channels(norms, n, m, prune, numbers)
    factors = torch.zeros(len(norms))
    factors[index] = m / n if factor is None else factor
    return factors.view(-1, m)


@pytest.mark.parametrize(("n", "m", "kind"), test_statistics.CASES)
def test_mvue_is_unbiased(n, m, kind):
    """A channel kept with probability pi is multiplied by 1 / pi; false alarms as said there."""
    row = test_statistics.gradients(m)[kind]
    factors, pi = draws(row, n, "mvue"), test_statistics.probabilities(row, n, "mvue")
    for i, (norm, p) in enumerate(zip(row, pi, strict=True)):
        own = factors[:, i][factors[:, i] != 0]
        if norm and p and len(own):
            torch.testing.assert_close(own, torch.full_like(own, 1 / p), rtol=1e-5, atol=0)
    # Of channels without a gradient any may fill the places that are left.
    nonzero = torch.tensor([norm != 0 for norm in row])
    assert_frequencies((factors != 0)[:, nonzero], [p for p, g in zip(pi, row, strict=True) if g])


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8)])
def test_random_draws_every_set_equally_often(n, m):
    kept = draws([1.0] * m, n, "random") != 0
    codes = (kept * 2 ** torch.arange(m)).sum(1)
    sets = [sum(2**i for i in part) for part in itertools.combinations(range(m), n)]
    assert set(codes.tolist()) <= set(sets)
    assert_frequencies(codes.unsqueeze(1) == torch.tensor(sets), [1 / len(sets)] * len(sets))


# The graph


def dense_half(gm):
    (node,) = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
        if node.args[10][1]
    ]
    return node


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rewrites_the_input_gradient_and_nothing_else(name):
    gm = test_pass.layer_graph(name)
    (before,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    grad_output, x, weight, *others = before.args[:10]
    has_bias = before.args[10][2]
    (decision,) = prune_input_grads(gm.graph, always())
    assert (decision.pruned, decision.reason) == (True, "")
    assert decision.grad_output == tuple(grad_output.meta["val"].shape)

    input_grad, weight_grad, _ = gradients(gm)
    half = backward_of(input_grad)
    assert half.args[1] is x
    assert half.args[3:] == (*others, [True, False, False])
    kept, taken = (node.meta["val"].shape for node in (half.args[0], half.args[2]))
    channels, groups = decision.grad_output[1], others[-1]
    assert kept == (decision.grad_output[0], channels // 2, *decision.grad_output[2:])
    outputs = taken[1] * groups if decision.transposed else taken[0]
    assert outputs == channels // 2
    assert taken.numel() * 2 == weight.meta["val"].numel()
    assert dense_half(gm) is backward_of(weight_grad)
    assert dense_half(gm).args == (grad_output, x, weight, *others, [False, True, has_bias])
    assert not gm.graph.find_nodes(op="call_function", target=PRUNE_NM)


@pytest.mark.parametrize(
    ("name", "prune", "dtype"),
    [
        *((name, "rescaled_magnitude", torch.float32) for name in CONVOLUTIONS),
        *(("conv2d", "rescaled_magnitude", dtype) for dtype in (torch.bfloat16, torch.float16)),
        ("conv2d", "magnitude", torch.float32),
    ],
)
def test_convolutions_give_the_same_numbers(name, prune, dtype):
    gm = test_pass.layer_graph(name, dtype)
    inputs = random_inputs(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    input_grad, *others = (grad.name for grad in gradients(gm) if grad)
    before = run(gm, inputs)
    prune_input_grads(gm.graph, always(prune, n=1))
    gm.recompile()
    after = run(gm, inputs)
    for other in others:
        assert torch.equal(after[other], before[other])
    grad_output, x, weight = (before[a.name].double() for a in node.args[:3])
    operands = (pruned(grad_output, 1, 4, prune), x, weight, *node.args[3:10])
    expected = torch.ops.aten.convolution_backward(*operands, [True, False, False])[0]
    assert relative_error(after[input_grad], expected) < TOLERANCE[dtype]
    assert after[input_grad].stride() == before[input_grad].stride()


@pytest.mark.parametrize("name", ["conv2d", "grouped"])
@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_drawn_channels_are_those_of_a_subset(name, prune):
    """Each kept channel of grad_output is one of the dense ones, times a factor."""
    gm = test_pass.layer_graph(name)
    prune_input_grads(gm.graph, always(prune))
    gm.recompile()
    values = run(gm, random_inputs(gm))
    kept = values[backward_of(gradients(gm)[0]).args[0].name]
    dense = values[dense_half(gm).args[0].name]
    for i, channel in enumerate(kept.unbind(1)):
        group = dense.unbind(1)[i // 2 * 4 : i // 2 * 4 + 4]
        scale = [(channel / other).flatten() for other in group]
        assert sum(bool((s - s[0]).abs().max() < 1e-5 * s[0].abs()) for s in scale) == 1


@pytest.mark.parametrize("prune", ["magnitude", "rescaled_magnitude"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["conv2d", "1x1", "grouped", "transposed grouped"])
def test_recorded_values_match_the_real_ones(name, memory_format, prune):
    layer, shape = CONVOLUTIONS[name]
    layer = layer.to(memory_format=memory_format)
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    gm = joint_graph(layer, x)
    inputs = random_inputs(gm)
    prune_input_grads(gm.graph, always(prune))
    gm.recompile()
    values = run(gm, inputs)
    for node in gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD):
        for new in (node, *node.all_input_nodes):
            test_pass.assert_same_form(new.meta["val"], values[new.name])
    kept = backward_of(gradients(gm)[0]).args[0].meta["val"]
    assert kept.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers_give_the_same_numbers(name):
    gm = test_linears.layer_graph(name)
    inputs = random_inputs(gm)
    before = run(gm, inputs)
    old = {node: node.args for node in gm.graph.nodes}
    config = always(targets="linear")
    (decision,) = prune_input_grads(gm.graph, config)
    gm.recompile()
    after = run(gm, inputs)
    assert decision.pruned
    (changed,) = [n for n in gm.graph.nodes if n in old and n.args != old[n]]
    for node in test_linears.products(gm):
        if node is not changed:
            assert torch.equal(after[node.name], before[node.name])
    left, right = (before[operand.name] for operand in old[changed])
    if name == "column-major":
        expected = left @ pruned(right, 2, 4, config.prune, dim=right.dim() - 2)
    else:
        expected = pruned(left, 2, 4, config.prune, dim=left.dim() - 1) @ right
    assert relative_error(after[changed.name], expected) < TOLERANCE[torch.float32]
    assert changed.args[0].meta["val"].shape[-1] == old[changed][0].meta["val"].shape[-1] // 2
    for operand in (changed, *changed.args):
        test_pass.assert_same_form(operand.meta["val"], after[operand.name])


@pytest.mark.parametrize("prune", ["rescaled_magnitude", "mvue"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("conv", "conv2d"),
        ("conv", "transposed grouped"),
        *(("linear", name) for name in ("rows", "column-major", "batched")),
    ],
)
def test_idempotent(kind, name, prune):
    gm = (test_pass if kind == "conv" else test_linears).layer_graph(name)
    config = always(prune, targets=kind)
    decisions = prune_input_grads(gm.graph, config)
    once = copy_graph(gm)
    assert prune_input_grads(gm.graph, config) == decisions
    assert [node.format_node() for node in gm.graph.nodes] == [
        node.format_node() for node in once.graph.nodes
    ]
    assert decisions[0].pruned


def test_layers_draw_numbers_of_their_own():
    gm = joint_graph(test_pass.Block(), torch.randn(1, 3, 9, 9))
    decisions = prune_input_grads(gm.graph, always("random"))
    (draw,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.randint.default)
    counts = [d.grad_output[1] for d in decisions if d.pruned]
    ends = list(itertools.accumulate(counts))
    assert draw.args[1] == [ends[-1]]
    parts = [user.args[1:] for user in draw.users]
    assert parts == [(0, end - count, end) for count, end in zip(counts, ends, strict=True)]


# Which layers


def reasons(model, x, **options):
    torch._dynamo.reset()
    decisions = prune_input_grads(joint_graph(model, x).graph, SDGPConfig(**options))
    return [d.reason for d in decisions]


def test_only_layers_that_it_pays_for():
    """At 2:4, products that use each value of the gradient less often than it costs stay dense."""
    least = 2 * COST["cpu"]
    for inputs, reason in ((least, ""), (least - 1, the_pass.DOES_NOT_PAY)):
        x = torch.randn(2, inputs, 3, 3, requires_grad=True)
        assert reasons(nn.Conv2d(inputs, 8, 1), x, structure="channel") == [reason]
        assert reasons(nn.Conv2d(inputs, 8, 1), x, structure="channel_always") == [""]
        assert reasons(nn.Conv2d(inputs, 8, 1), x) == [""]
        x = torch.randn(2, inputs, requires_grad=True)
        found = reasons(nn.Linear(inputs, 8), x, structure="channel", targets="linear")
        assert found == [reason]
        x = torch.randn(2, 4 * inputs, 3, 3, requires_grad=True)
        layer = nn.ConvTranspose2d(4 * inputs, 8, 1, stride=2)
        assert reasons(layer, x, structure="channel") == [reason]
        layer = nn.Conv2d(4 * inputs, 16, 1, groups=4)
        assert reasons(layer, x, structure="channel") == [reason]
    x = torch.randn(2, least // 2, 3, 3, requires_grad=True)
    layer = nn.Conv2d(least // 2, 16, 1)
    assert reasons(layer, x, structure="channel") == [the_pass.DOES_NOT_PAY]
    assert reasons(layer, x, structure="channel", n=1, m=16) == [the_pass.DOES_NOT_PAY]
    assert reasons(layer, x, structure="channel", n=1, m=4, include="none") == [the_pass.EXCLUDED]


def test_the_other_reasons_are_those_of_elements():
    block, x = test_pass.Block(), torch.randn(1, 3, 9, 9)
    by_element = reasons(block, x)
    assert reasons(block, x, structure="channel_always") == by_element
    assert set(by_element) > {"", the_pass.DEPTHWISE, the_pass.NOT_A_MULTIPLE}


def test_explain_tells_what_would_not_pay():
    (first, second) = explain(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)),
        torch.randn(2, 3, 4, 4),
        options={"sdgp.structure": "channel"},
    )
    assert {first.reason, second.reason} == {the_pass.NO_INPUT_GRADIENT, the_pass.DOES_NOT_PAY}


def test_number_of_channels_must_be_known():
    def convolve(x, weight):
        return torch.nn.functional.conv2d(x, weight).sin().sum()

    x, weight = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(16, 8, 3, 3)
    torch._dynamo.mark_dynamic(weight, 0)
    options = {"sdgp.structure": "channel_always", "sdgp.inner": "aot_eager"}
    with pytest.warns(UserWarning, match="pruned nothing"):
        torch.compile(convolve, backend="sdgp", options=options)(x, weight)


@pytest.mark.parametrize("scope", ["feature_map", "channel"])
@pytest.mark.parametrize("structure", ["channel", "channel_always"])
def test_only_scope_is_the_group(structure, scope):
    expected = f"^sdgp.rescale: expected 'group' with .*'{structure}', got '{scope}'"
    with pytest.raises(ValueError, match=expected):
        SDGPConfig(structure=structure, rescale=scope)


# Training


class ChannelSDGP(EagerSDGP):
    def prune(self, dense, kind, groups):
        n, m, prune = (self.pruning[name] for name in ("n", "m", "prune"))
        return pruned(dense, n, m, prune, dense.dim() - 1 if kind == "linear" else 1)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.hidden = nn.Linear(16, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = self.up(self.body(self.norm(self.stem(x)).relu()).sin())
        return self.head(self.hidden(x.sin().mean((2, 3))).sin())


def grads(model, forward, x):
    model.zero_grad()
    forward(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_network_is_trained_as_by_the_definition(inner):
    """With batches of several sizes, and of both memory formats with aot_eager."""
    model = Network()
    settings = {"prune": "rescaled_magnitude", "n": 1, "m": 4}
    options = {f"sdgp.{name}": value for name, value in settings.items()}
    options |= {"sdgp.structure": "channel_always", "sdgp.inner": inner}
    options |= {"sdgp.targets": "conv,linear"}
    compiled = torch.compile(model, backend="sdgp", options=options, dynamic=True)

    def by_definition(x):
        with ChannelSDGP("conv,linear", **settings):
            return model(x)

    for size in (4, 6):
        x = torch.randn(size, 3, 10, 10)
        expected, got = (grads(model, forward, x) for forward in (by_definition, compiled))
        for name, value in expected.items():
            assert relative_error(got[name], value) < 1e-4, name
        dense = grads(model, model, x)
        assert relative_error(got["stem.weight"], dense["stem.weight"]) > 0.01


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_inductor_repeats_a_seed_and_not_a_step(prune):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    options = {"sdgp.structure": "channel_always", "sdgp.prune": prune, "sdgp.m": 8}
    compiled = torch.compile(model, backend="sdgp", options=options)
    x = torch.randn(2, 3, 9, 9)
    results = []
    for seed in (1, 1, None):
        if seed is not None:
            torch.manual_seed(seed)
        results.append(grads(model, lambda x: compiled(x).sin(), x)["0.weight"].clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
