"""Test pruning of whole channels: the choice against loops, the graph against the definition."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from sdgp_fx import SDGPConfig
from sdgp_fx.kernels.channels import select_channels
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes import decisions as why
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from ..helpers import frequencies
from ..helpers.eager_sdgp import EagerSDGP
from ..helpers.frequencies import assert_frequencies
from ..helpers.graphs import backward_of, copy_graph, gradients, joint_graph, random_inputs, run
from ..helpers.layers import (
    CONVOLUTIONS,
    LINEARS,
    Block,
    assert_same_form,
    convolution_graph,
    linear_graph,
    linear_products,
)

PATTERNS = [(2, 4), (1, 4), (3, 8), (2, 16), (16, 32), (1, 1)]

# Relative to the norm of a gradient: sums of products in another order, 2**-24 each; for bfloat16,
# one rounding of values times factors and one of the result.
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def by_channel(prune="rescaled_magnitude", **settings):
    return SDGPConfig(structure="channel", prune=prune, **settings)


def chosen(norms, n, m, prune):
    """Return lists of the kept channels and of their factors, by a loop over groups."""
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
    """Return grad_output with zeros for channels that are not kept, and the others scaled."""
    others = [d for d in range(grad_output.dim()) if d != dim]
    norms = grad_output.double().abs().sum(others).tolist()
    result = torch.zeros_like(grad_output).movedim(dim, 0)
    for channel, factor in zip(*chosen(norms, n, m, prune), strict=True):
        result[channel] = grad_output.movedim(dim, 0)[channel] * factor
    return result.movedim(0, dim)


def relative_error(result, exact):
    return ((result - exact).double().norm() / exact.double().norm()).item()


# Choice of channels


def groups_of(m):
    """Return norms in which there is something to get wrong, one group each."""
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
    """Return the factors of many groups with the norms of row: 0 for channels not kept."""
    m, count = len(row), frequencies.DRAWS
    norms = torch.tensor(row).abs().repeat(count)
    generator = torch.Generator().manual_seed(n + m)
    size = len(norms) if prune == "random" else count
    numbers = torch.randint(2**63 - 1, (size,), generator=generator)
    index, factor = select_channels(norms, n, m, prune, numbers)
    factors = torch.zeros(len(norms))
    factors[index] = m / n if factor is None else factor
    return factors.view(-1, m)


@pytest.mark.parametrize(("n", "m", "kind"), frequencies.CASES)
def test_mvue_is_unbiased(n, m, kind):
    """A channel kept with probability pi is multiplied by 1 / pi.

    `helpers.frequencies` says how likely false alarms are.
    """
    row = frequencies.gradients(m)[kind]
    factors, pi = draws(row, n, "mvue"), frequencies.probabilities(row, n, "mvue")
    for i, (norm, p) in enumerate(zip(row, pi, strict=True)):
        own = factors[:, i][factors[:, i] != 0]
        if norm and p and len(own):
            torch.testing.assert_close(own, torch.full_like(own, 1 / p), rtol=1e-5, atol=0)
    # Any channels without a gradient may fill the places that are left.
    nonzero = torch.tensor([norm != 0 for norm in row])
    assert_frequencies((factors != 0)[:, nonzero], [p for p, g in zip(pi, row, strict=True) if g])


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8)])
def test_random_draws_every_set_equally_often(n, m):
    kept = draws([1.0] * m, n, "random") != 0
    codes = (kept * 2 ** torch.arange(m)).sum(1)
    sets = [sum(2**i for i in part) for part in itertools.combinations(range(m), n)]
    assert set(codes.tolist()) <= set(sets)
    assert_frequencies(codes.unsqueeze(1) == torch.tensor(sets), [1 / len(sets)] * len(sets))


# Graph


def dense_half(gm):
    (node,) = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
        if node.args[10][1]
    ]
    return node


@pytest.mark.parametrize(
    ("name", "prune", "dtype"),
    [
        *((name, "rescaled_magnitude", torch.float32) for name in CONVOLUTIONS),
        *(("conv2d", "rescaled_magnitude", dtype) for dtype in (torch.bfloat16, torch.float16)),
        ("conv2d", "magnitude", torch.float32),
    ],
)
def test_rewrites_the_input_gradient_and_nothing_else(name, prune, dtype):
    """Check edges and numbers."""
    gm = convolution_graph(name, dtype)
    inputs = random_inputs(gm)
    (old,) = gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD)
    grad_output, x, weight, *others, (_, _, has_bias) = old.args
    input_grad, *other_grads = gradients(gm)
    before = run(gm, inputs)
    (decision,) = prune_input_grads(gm.graph, by_channel(prune, n=1))
    gm.recompile()
    after = run(gm, inputs)

    assert (decision.pruned, decision.reason) == (True, "")
    shape = tuple(grad_output.meta["val"].shape)
    assert decision.grad_output_shape == shape
    half = backward_of(input_grad)
    assert half.args[1] is x
    assert half.args[3:] == (*others, [True, False, False])
    kept, taken = (node.meta["val"].shape for node in (half.args[0], half.args[2]))
    assert kept == (shape[0], shape[1] // 4, *shape[2:])
    assert (taken[1] * others[-1] if decision.transposed else taken[0]) == shape[1] // 4
    assert taken.numel() * 4 == weight.meta["val"].numel()
    assert dense_half(gm).args == (grad_output, x, weight, *others, [False, True, has_bias])
    assert not gm.graph.find_nodes(op="call_function", target=PRUNE_NM)
    for node in (half, *half.all_input_nodes):
        assert_same_form(node.meta["val"], after[node.name])

    for other in filter(None, other_grads):
        assert torch.equal(after[other.name], before[other.name])
    dense, *operands = (before[a.name].double() for a in old.args[:3])
    operands = (pruned(dense, 1, 4, prune), *operands, *old.args[3:10])
    expected = torch.ops.aten.convolution_backward(*operands, [True, False, False])[0]
    assert relative_error(after[input_grad.name], expected) < TOLERANCE[dtype]
    assert after[input_grad.name].stride() == before[input_grad.name].stride()


@pytest.mark.parametrize("name", ["conv2d", "grouped"])
@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_drawn_channels_are_those_of_a_subset(name, prune):
    """Each kept channel of grad_output is one of the dense ones, times a factor."""
    gm = convolution_graph(name)
    prune_input_grads(gm.graph, by_channel(prune))
    gm.recompile()
    values = run(gm, random_inputs(gm))
    kept = values[backward_of(gradients(gm)[0]).args[0].name]
    dense = values[dense_half(gm).args[0].name]
    for i, channel in enumerate(kept.unbind(1)):
        group = dense.unbind(1)[i // 2 * 4 : i // 2 * 4 + 4]
        scale = [(channel / other).flatten() for other in group]
        assert sum(bool((s - s[0]).abs().max() < 1e-5 * s[0].abs()) for s in scale) == 1


@pytest.mark.parametrize("name", ["conv2d", "1x1", "grouped", "transposed grouped"])
def test_nothing_is_transposed(name):
    """Channels stay last, and the strides on record are the real ones."""
    layer, shape = CONVOLUTIONS[name]
    layer = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    gm = joint_graph(layer, x)
    inputs = random_inputs(gm)
    prune_input_grads(gm.graph, by_channel())
    gm.recompile()
    values = run(gm, inputs)
    half = backward_of(gradients(gm)[0])
    for node in (half, *half.all_input_nodes):
        assert_same_form(node.meta["val"], values[node.name])
    assert half.args[0].meta["val"].is_contiguous(memory_format=torch.channels_last)
    if not name.startswith("transposed"):
        assert half.args[2].meta["val"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers_give_the_same_numbers(name):
    gm = linear_graph(name)
    inputs = random_inputs(gm)
    before = run(gm, inputs)
    old = {node: node.args for node in gm.graph.nodes}
    config = by_channel(targets="linear")
    (decision,) = prune_input_grads(gm.graph, config)
    gm.recompile()
    after = run(gm, inputs)
    assert decision.pruned
    (changed,) = [n for n in gm.graph.nodes if n in old and n.args != old[n]]
    for node in linear_products(gm):
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
        assert_same_form(operand.meta["val"], after[operand.name])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("conv", "conv2d"),
        ("conv", "transposed grouped"),
        *(("linear", name) for name in ("rows", "column-major", "batched")),
    ],
)
def test_idempotent(kind, name):
    gm = (convolution_graph if kind == "conv" else linear_graph)(name)
    config = by_channel("mvue", targets=kind)
    decisions = prune_input_grads(gm.graph, config)
    once = copy_graph(gm)
    assert prune_input_grads(gm.graph, config) == decisions
    assert [node.format_node() for node in gm.graph.nodes] == [
        node.format_node() for node in once.graph.nodes
    ]
    assert decisions[0].pruned


def test_layers_draw_numbers_of_their_own():
    gm = joint_graph(Block(), torch.randn(1, 3, 9, 9))
    decisions = prune_input_grads(gm.graph, by_channel("random"))
    (draw,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.randint.default)
    counts = [d.grad_output_shape[1] for d in decisions if d.pruned]
    ends = list(itertools.accumulate(counts))
    assert draw.args[1] == [ends[-1]]
    parts = [user.args[1:] for user in draw.users]
    assert parts == [(0, end - count, end) for count, end in zip(counts, ends, strict=True)]


# Selection of layers


def test_the_other_reasons_are_those_of_elements():
    gm = joint_graph(Block(), torch.randn(1, 3, 9, 9))
    by_element, by_channel = (
        prune_input_grads(copy_graph(gm).graph, SDGPConfig(structure=structure))
        for structure in ("element", "channel")
    )
    facts = ("module", "grad_output_shape", "weight_shape", "groups", "pruned", "reason")
    of_each = [
        [[getattr(d, fact) for fact in facts] for d in ds] for ds in (by_element, by_channel)
    ]
    assert of_each[0] == of_each[1]
    assert {d.reason for d in by_element} > {"", why.DEPTHWISE, why.NOT_A_MULTIPLE}


def test_number_of_channels_must_be_known():
    def convolve(x, weight):
        return torch.nn.functional.conv2d(x, weight).sin().sum()

    x, weight = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(16, 8, 3, 3)
    torch._dynamo.mark_dynamic(weight, 0)
    options = {"sdgp.structure": "channel", "sdgp.inner": "aot_eager"}
    with pytest.warns(UserWarning, match="pruned nothing"):
        torch.compile(convolve, backend="sdgp", options=options)(x, weight)


@pytest.mark.parametrize("scope", ["feature_map", "channel"])
def test_only_scope_is_the_group(scope):
    expected = f"^sdgp.rescale: expected 'group' with .*'channel', got '{scope}'"
    with pytest.raises(ValueError, match=expected):
        SDGPConfig(structure="channel", rescale=scope)


# Training


class ChannelSDGP(EagerSDGP):
    def prune(self, dense, kind, groups):
        n, m, prune = (self.pruning[name] for name in ("n", "m", "prune"))
        return pruned(dense, n, m, prune, dense.dim() - 1 if kind == "linear" else 1)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, bias=False)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.up(self.body(self.stem(x).relu()).sin())
        return self.head(x.sin().mean((2, 3)))


def grads(model, forward, x):
    model.zero_grad()
    forward(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_network_is_trained_as_by_the_definition(inner):
    """Train on batches of several sizes, and in both memory formats with aot_eager."""
    model = Network()
    settings = {"prune": "rescaled_magnitude", "n": 1, "m": 4}
    options = {f"sdgp.{name}": value for name, value in settings.items()}
    options |= {"sdgp.structure": "channel", "sdgp.inner": inner}
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


def test_inductor_repeats_a_seed_and_not_a_step():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    options = {"sdgp.structure": "channel", "sdgp.prune": "mvue", "sdgp.m": 8}
    compiled = torch.compile(model, backend="sdgp", options=options)
    x = torch.randn(2, 3, 9, 9)
    results = []
    for seed in (1, 1, None):
        if seed is not None:
            torch.manual_seed(seed)
        results.append(grads(model, lambda x: compiled(x).sin(), x)["0.weight"].clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
