"""Test training setups: some compiled steps of each against SDGP in eager mode in that setup."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sdgp_fx
from sdgp_fx import graph_pass

from ..helpers.eager_sdgp import eager_sdgp

TARGETS = "conv,linear"
OPTIONS = {"sdgp.inner": "aot_eager", "sdgp.targets": TARGETS}
STEPS = 3


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 8)

    def features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))

    def forward(self, x):
        return self.head(self.hidden(self.features(x)).relu())


class Checkpointed(Network):
    def features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x.mean((2, 3))


class WithGraphBreak(Network):
    def forward(self, x):
        x = self.features(x)
        torch._dynamo.graph_break()
        return self.head(self.hidden(x).relu())


class CalledTwice(Network):
    def features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(block(x))
        return x.mean((2, 3))


class Shared(Network):
    def __init__(self):
        super().__init__()
        self.blocks[1] = self.blocks[0]


class Functional(Network):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.mixing = nn.Parameter(torch.randn(8, 8))
        self.shift = nn.Parameter(torch.zeros(8))

    def features(self, x):
        x = F.conv2d(self.stem(x), self.weight)
        return F.linear(x.mean((2, 3)), self.mixing, self.shift)


def make(kind=Network):
    torch.manual_seed(0)
    return kind()


def batches(count=STEPS, size=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(size, 3, 12, 12, generator=generator)
        yield x, torch.randint(8, (size,), generator=generator)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)


def compiled(model):
    return torch.compile(model, backend="sdgp", options=OPTIONS)


def defined(model):
    return eager_sdgp(model, TARGETS)


def train(model, forward, context=contextlib.nullcontext):
    optimizer = sgd(model)
    for x, y in batches():
        with context():
            loss = F.cross_entropy(forward(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_parameters(model, other, rtol=1e-4, atol=1e-5):
    expected = dict(other.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=rtol, atol=atol, msg=name)


@pytest.fixture
def decided(monkeypatch):
    """Return the decisions of each graph that is compiled."""
    graphs = []
    monkeypatch.setattr(graph_pass, "_report", lambda graph, made: graphs.append(made))
    return graphs


def names(decided):
    return sorted(d.module for made in decided for d in made if d.pruned)


PRUNED = ["blocks.0.conv", "blocks.1.conv", "head", "hidden"]


@pytest.mark.parametrize(
    ("kind", "pruned"),
    [
        (Network, PRUNED),
        (Checkpointed, PRUNED),
        (WithGraphBreak, PRUNED),
        (CalledTwice, sorted(["blocks.0.conv", "blocks.1.conv", *PRUNED])),
        # One module has one name, whatever it is also kept as.
        (Shared, ["blocks.0.conv", "blocks.0.conv", "head", "hidden"]),
        (Functional, ["", "", "head", "hidden"]),
    ],
)
def test_networks(kind, pruned, decided):
    model, other = make(kind), make(kind)
    train(model, compiled(model))
    train(other, defined(other))
    assert_same_parameters(model, other)
    assert names(decided) == pruned
    dense = make(kind)
    train(dense, dense)
    with pytest.raises(AssertionError):
        assert_same_parameters(model, dense, rtol=1e-2, atol=1e-3)


def test_fullgraph():
    model, other = make(), make()
    train(model, torch.compile(model, backend="sdgp", options=OPTIONS, fullgraph=True))
    train(other, defined(other))
    assert_same_parameters(model, other)


def test_channels_last():
    model, other = (make().to(memory_format=torch.channels_last) for _ in range(2))
    run = compiled(model)
    train(model, lambda x: run(x.to(memory_format=torch.channels_last)))
    train(other, defined(other))
    assert_same_parameters(model, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Parameters agree within rounding: a tie or near tie in a group may be pruned differently."""

    def context():
        return torch.autocast("cpu", dtype)

    model, other = make(), make()
    train(model, compiled(model), context)
    train(other, defined(other), context)
    assert_same_parameters(model, other, rtol=5e-2, atol=2e-2)


def test_grad_scaler_skips_a_step_that_overflows():
    """The step is skipped even if the only infinity is in a gradient that is pruned."""
    model = make()
    run, optimizer = compiled(model), sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    before = copy.deepcopy(model.state_dict())
    for x, y in batches(2):
        with torch.autocast("cpu", torch.float16):
            output = run(x)
            loss = F.cross_entropy(output.float(), y) * (1e9 if scaler.get_scale() > 2**13 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        changed = any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert changed == (scaler.get_scale() < 2**14)
        assert torch.isfinite(model.hidden.weight.grad).all() == changed
        optimizer.zero_grad()
        scaler.update()
    assert changed
    assert scaler.get_scale() == 2**13


def test_gradient_accumulation():
    model, other = make(), make()
    for net, forward in ((model, compiled(model)), (other, defined(other))):
        optimizer = sgd(net)
        for x, y in batches(2):
            for part, label in zip(x.chunk(2), y.chunk(2), strict=True):
                (F.cross_entropy(forward(part), label) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(model, other)


def test_gradient_clipping_and_moving_average():
    model, other = make(), make()
    averages = []
    for net, forward in ((model, compiled(model)), (other, defined(other))):
        optimizer = sgd(net)
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for x, y in batches():
            F.cross_entropy(forward(x), y).backward()
            clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(net)
        averages.append(average)
    assert_same_parameters(model, other)
    assert_same_parameters(*averages)


def test_frozen_layers(decided):
    """The input gradient still flows through a frozen layer to the layers before it."""
    model, other = make(), make()
    for net in (model, other):
        net.blocks[1].requires_grad_(False)
        net.hidden.requires_grad_(False)
    train(model, compiled(model))
    train(other, defined(other))
    assert_same_parameters(model, other)
    assert names(decided) == PRUNED


def test_feature_extraction():
    model, other = make(), make()
    for net in (model, other):
        net.requires_grad_(False)
        net.head.requires_grad_(True)
    with pytest.warns(UserWarning, match="pruned nothing in a training graph: 1 x no input grad"):
        train(model, compiled(model))
    train(other, defined(other))
    assert_same_parameters(model, other)


def test_eval_then_train(decided):
    model, other = make(), make()
    x, _ = next(batches())
    for net, forward in ((model, compiled(model)), (other, defined(other))):
        net.eval()
        with torch.no_grad():
            first = forward(x)
        net.train()
        train(net, forward)
        net.eval()
        with torch.no_grad():
            assert not torch.equal(forward(x), first)
    assert_same_parameters(model, other)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)


def test_regional_compilation(decided):
    """Blocks are compiled one by one; each is the root of its own graph."""
    model, other = make(), make()
    for block in model.blocks:
        block.compile(backend="sdgp", options=OPTIONS)
    train(model, model)
    for block in other.blocks:
        block.forward = eager_sdgp(block.forward)
    train(other, other)
    assert_same_parameters(model, other)
    assert set(names(decided)) == {"conv"}


def test_a_module_that_is_compiled_within_a_compiled_model(decided):
    """The module is part of the model's graph, and its own backend is not asked."""
    model, other = make(), make()
    model.blocks[0].compile(backend="eager")
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    train(model, compiled(model))
    model.blocks[1] = model.blocks[1]._orig_mod
    train(other, defined(other))
    assert_same_parameters(model, other)
    assert names(decided) == PRUNED


class Holder:
    def __init__(self, model):
        self.model = model

    def forward(self, x):
        return self.model(x)


def in_containers(models, x):
    return models["trained"][0](x)


def with_any_arguments(*args):
    return args[0](args[1])


HOLDERS = {
    "itself": lambda model: model.forward,
    "attribute": lambda model: Holder(model).forward,
    "containers": lambda model: functools.partial(in_containers, {"trained": [model]}),
    "arguments": lambda model: functools.partial(with_any_arguments, model),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_names_start_at_the_model_whatever_holds_it(holder, decided):
    model = make()
    options = {**OPTIONS, "sdgp.exclude": "blocks.*"}
    train(model, torch.compile(HOLDERS[holder](model), backend="sdgp", options=options))
    assert names(decided) == ["head", "hidden"]
    dense = sorted(d.module for made in decided for d in made if not d.pruned)
    assert dense == ["blocks.0.conv", "blocks.1.conv", "stem"]


@pytest.mark.parametrize("backend", ["aot_eager", "sdgp"])
def test_compiled_autograd(backend):
    model, other = make(), make()
    run = compiled(model)
    options = OPTIONS if backend == "sdgp" else None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, options=options)):
        train(model, run)
    train(other, defined(other))
    assert_same_parameters(model, other)


def test_functional_call_and_grad():
    model = make().eval()  # No transform of torch.func lets BatchNorm count batches.
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    (x, y), *_ = batches(1)

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, (parameters, buffers), (x,)), y)

    options = {**OPTIONS, "sdgp.gradients": "all"}
    step = torch.compile(torch.func.grad(loss), backend="sdgp", options=options)
    result = step(parameters, x, y)
    other = make().eval()
    F.cross_entropy(defined(other)(x), y).backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(result[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_two_models_and_two_settings_in_one_process(decided):
    """A model compiled again with other options is compiled anew, and the first stays as it is."""
    model, twin = make(), make()
    (x, y), *_ = batches(1)

    def gradient(net, forward):
        net.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        return net.stem.weight.grad.clone()

    half = compiled(model)
    quarter = torch.compile(model, backend="sdgp", options={**OPTIONS, "sdgp.n": 1})
    of_twin = compiled(twin)
    first = gradient(model, half)
    assert not torch.allclose(gradient(model, quarter), first, rtol=1e-2)
    assert torch.equal(gradient(model, half), first)
    assert torch.equal(gradient(twin, of_twin), first)


def test_state_dict_is_the_plain_models(tmp_path):
    model = make()
    run = compiled(model)
    train(model, run)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    plain = make()
    plain.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    assert_same_parameters(model, plain, rtol=0, atol=0)
    again = make()
    torch.compile(again, backend="sdgp", options=OPTIONS).load_state_dict(run.state_dict())
    assert_same_parameters(model, again, rtol=0, atol=0)


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_checkpointing_draws_the_pruning_once(prune):
    """The recomputed forward does not draw anew: a seed gives the same run as without."""
    results = []
    for kind in (Network, Checkpointed):
        torch._dynamo.reset()
        model = make(kind)
        run = torch.compile(model, backend="sdgp", options={**OPTIONS, "sdgp.prune": prune})
        torch.manual_seed(5)
        train(model, run)
        results.append(model)
    assert_same_parameters(*results)


@pytest.mark.gpu
def test_cuda_graphs():
    model = make().cuda()
    run = torch.compile(model, backend="sdgp", mode="reduce-overhead")
    optimizer, losses = sgd(model), []
    x, y = (t.cuda() for t in next(batches()))
    for _ in range(10):
        loss = F.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_explain_names_what_training_prunes(decided):
    decisions = sdgp_fx.explain(make(), next(batches())[0], options=OPTIONS)
    assert sorted(d.module for d in decisions if d.pruned) == PRUNED
