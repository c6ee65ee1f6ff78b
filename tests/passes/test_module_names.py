"""Test the names of layers against `named_modules()`, and what rules and warnings make of them."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from sdgp_fx.backend import aot_eager
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes import decisions as why
from sdgp_fx.passes.convolutions import find_convolutions
from sdgp_fx.passes.module_names import ModuleNames, module_name, module_names

EAGER = {"sdgp.inner": "aot_eager", "sdgp.targets": "conv,linear"}


def train(model, *inputs, rewritten, **options):
    """Run a step of a compiled model or function; return the decisions, by name, in order."""
    torch._dynamo.reset()
    rewritten.clear()
    options = {f"sdgp.{key}": value for key, value in options.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sdgp", UserWarning)
        compiled = torch.compile(model, backend="sdgp", options={**EAGER, **options})
        compiled(*inputs).square().sum().backward()
    made = [decision for _, decisions in rewritten for decision in reversed(decisions)]
    count = sum(
        len(graph.find_nodes(op="call_function", target=PRUNE_NM)) for graph, _ in rewritten
    )
    assert count == sum(decision.pruned for decision in made)
    return made


def conv(channels=8, **kwargs):
    return nn.Conv2d(channels, 8, 1, **kwargs)


class GetsAttributes(nn.Module):
    """Look attributes up by a method of its own, as models of diffusers and PEFT do."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = conv(3), nn.ModuleList([conv(), nn.Sequential(conv())])

    def __getattr__(self, name):
        return super().__getattr__(name)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.down:
            x = layer(x)
        return x


class KeepsList(nn.Module):
    """Run modules from a plain list, as detectron2's FPN does."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3)
        self.layers = [conv(), conv()]
        for i, layer in enumerate(self.layers):
            self.add_module(f"lateral{i}", layer)
        self.layers.reverse()

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


class OddKeys(nn.Module):
    def __init__(self):
        super().__init__()
        keys = ("0", "e'f", 'e"f', "g[0]", "_modules2", "_orig", "L['self']", "-1")
        self.d = nn.ModuleDict({key: conv(8 if i else 3) for i, key in enumerate(keys)})

    def forward(self, x):
        for key in self.d:
            x = self.d[key](x)
        return x


class ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        gw = torch.einsum("nohw,nihw->oi", g, x)[:, :, None, None]
        return torch.nn.grad.conv2d_input(x.shape, weight, g), gw


class OwnFunction(nn.Conv2d):
    def forward(self, x):
        return ConvFunction.apply(x, self.weight)


class FunctionOfScaled(nn.Conv2d):
    """Multiply with a weight that is no parameter of anybody."""

    def forward(self, x):
        return ConvFunction.apply(x, self.weight.softmax(1))


class Breaks(nn.Module):
    """Break the graph in a module within the model."""

    def __init__(self, inner):
        super().__init__()
        self.stem, self.body, self.head = conv(3), nn.ModuleList([inner]), conv()

    def forward(self, x):
        return self.head(self.body[0](self.stem(x)))


class Halves(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.first, self.second = conv(channels), conv()

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class OtherVariable(Halves):
    def forward(this, x):
        x = this.first(x)
        torch._dynamo.graph_break()
        return this.second(x)


def by_function(x, weight):
    torch._dynamo.graph_break()
    return F.conv2d(x, weight)


class CallsFunction(nn.Module):
    """Give its weight to a function that has a graph of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x):
        return by_function(x, self.inner.weight)


class WeightOfChild(nn.Module):
    """Multiply with the weights of modules that it doesn't call, as torchvision's Swin does."""

    def __init__(self):
        super().__init__()
        self.stem, self.child, self.cast = conv(3), conv(), conv()

    def forward(self, x):
        x = F.conv2d(self.stem(x), self.child.weight)
        return F.conv2d(x.double(), self.cast.weight.double())


class GetsWeight(nn.Module):
    """Multiply with a weight that it is given, as hypernetworks do."""

    def __init__(self, name="body"):
        super().__init__()
        self.stem, self.weight = conv(3), nn.Parameter(torch.randn(8, 8, 1, 1))
        self.part = name
        self.add_module(name, Given())

    def forward(self, x):
        return self._modules[self.part](self.stem(x), self.weight)


class Given(nn.Module):
    def forward(self, x, weight):
        return F.conv2d(x, weight)


class Frozen(nn.Module):
    """Run layers without gradients ahead of others: they count in no sequence of operators."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(conv(3), conv()).requires_grad_(False)
        self.student = nn.Sequential(conv(), conv())

    def forward(self, x):
        return self.student(self.teacher(x))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x.flatten(2).mT)
        return self.attention(x, x, x, need_weights=False)[0]


class KeepsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = conv(3), conv()
        self.inner.run = self.inner.forward

    def forward(self, x):
        return self.inner.run(self.stem(x))


def twice():
    layer = conv()
    return nn.Sequential(conv(3), nn.Sequential(layer), layer)


MODELS = {
    "__getattr__": (GetsAttributes, ["stem", "down.0", "down.1.0"]),
    "a plain list": (KeepsList, ["stem", "lateral1", "lateral0"]),
    "keys": (OddKeys, [f"d.{key}" for key in OddKeys().d]),
    "autograd.Function": (lambda: nn.Sequential(conv(3), OwnFunction(8, 8, 1)), ["0", "1"]),
    "autograd.Function, own weight": (
        lambda: nn.Sequential(conv(3), FunctionOfScaled(8, 8, 1)),
        ["0", "1"],
    ),
    "graph break": (
        lambda: Breaks(Halves()),
        ["stem", "body.0.first", "body.0.second", "head"],
    ),
    "graph break ahead of all others": (
        lambda: nn.Sequential(Halves(3)),
        ["0.first", "0.second"],
    ),
    "graph break, other variable": (
        lambda: Breaks(OtherVariable()),
        ["stem", "body.0.first", "body.0.second", "head"],
    ),
    "graph break in a function": (
        lambda: Breaks(CallsFunction()),
        ["stem", "body.0.inner", "head"],
    ),
    "weight of a child": (WeightOfChild, ["stem", "child", "cast"]),
    "weight of another": (GetsWeight, ["stem", "body"]),
    "frozen": (Frozen, ["student.0", "student.1"]),
    "attention": (Attends, ["embed", "attention", "attention.out_proj"]),
    "forward kept": (KeepsForward, ["stem", "inner"]),
    "two names": (twice, ["0", "1.0", "1.0"]),
    "parametrized": (
        lambda: nn.Sequential(conv(3), parametrizations.weight_norm(conv())),
        ["0", "1"],
    ),
    "compiled inside": (
        lambda: nn.Sequential(conv(3), torch.compile(nn.Sequential(conv()), backend="eager")),
        ["0", "1.0"],
    ),
    "itself": (lambda: conv(3), [""]),
}


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize("model", MODELS)
def test_names_are_those_of_named_modules_and_rules_go_by_them(model, x, rewritten):
    make, expected = MODELS[model]
    network = make()
    plain = {d.module: d.reason for d in train(network, x, rewritten=rewritten)}
    assert list(plain) == list(dict.fromkeys(expected))
    assert plain.keys() <= {name.replace("_orig_mod.", "") for name, _ in network.named_modules()}
    chosen = expected[-1]
    excluded = {d.module: d for d in train(network, x, rewritten=rewritten, exclude=[chosen])}
    included = {d.module: d for d in train(network, x, rewritten=rewritten, include=[chosen])}
    for name, reason in plain.items():
        ruled = why.EXCLUDED if reason != why.NO_INPUT_GRADIENT else reason
        assert excluded[name].reason == (ruled if name == chosen else reason)
        assert included[name].reason == (reason if name == chosen else ruled)


@pytest.mark.parametrize("in_place", [True, False])
def test_names_of_a_module_compiled_in_place_and_of_its_forward(in_place, x, rewritten):
    network = Breaks(Halves())
    if in_place:
        network.compile(backend="sdgp", options=EAGER)
        network(x).sum().backward()
    else:
        torch.compile(network.forward, backend="sdgp", options=EAGER)(x).sum().backward()
    found = [d.module for _, made in rewritten for d in made]
    assert sorted(found) == ["body.0.first", "body.0.second", "head", "stem"]


class Trainer:
    """Run a model whose forward nobody calls, and keep a part in a variable across graph breaks."""

    def __init__(self):
        self.models = {
            "a": nn.ModuleDict({"stem": conv(3), "halves": Halves(), "head": conv()}),
            "b": nn.Sequential(conv()),
        }

    def step(self, x):
        model = self.models["a"]
        head = model["head"]
        x = model["halves"](model["stem"](x))
        return self.models["b"](head(x))


def test_names_in_a_function_start_at_the_outermost_modules(x, rewritten):
    trainer = Trainer()
    found = {d.module for d in train(trainer.step, x, rewritten=rewritten)}
    assert found == {"stem", "halves.first", "halves.second", "head", "0"}


def test_names_in_a_function_start_at_the_outermost_module_that_runs(x, rewritten):
    network = nn.Sequential(Halves(3))
    made = train(lambda x: network(x), x, rewritten=rewritten)
    assert {d.module for d in made} == {"0.first", "0.second"}


def test_names_of_a_model_with_parameters_from_outside(x, rewritten):
    network = nn.Sequential(conv(3), nn.Sequential(conv()))
    parameters = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}

    def run(x):
        return torch.func.functional_call(network, parameters, (x,))

    assert [d.module for d in train(run, x, rewritten=rewritten)] == ["0", "1.0"]


def names_of_convolutions(function, *inputs):
    """Return the names of all convolutions' backwards, in any graph, in order."""
    found = []

    def backend(gm, example_inputs):
        names = module_names(gm)

        def rewrite(graph):
            for part in graph.owning_module.modules():
                found.extend(map(names.of, find_convolutions(part.graph)))

        return aot_eager(rewrite)(gm, example_inputs)

    torch.compile(function, backend=backend)(*inputs).sum().backward()
    return found


def test_names_where_the_function_takes_gradients_itself(x):
    """These nodes belong to the call of the transform; the layers are those of the forward."""
    network = nn.Sequential(conv(3), nn.Sequential(conv()))
    parameters = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}

    def loss(x):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    found = names_of_convolutions(torch.func.grad(loss), x.requires_grad_())
    assert set(found) == {("0",), ("1.0",)}


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.hidden = conv(3), [conv()]

    def forward(self, x):
        return self.hidden[0](self.stem(x))


def test_a_layer_of_unknown_name_stays_dense_under_rules(x, rewritten):
    network = Unregistered()
    (_, layer) = train(network, x, rewritten=rewritten)
    assert (layer.module, layer.pruned) == (why.UNKNOWN, True)
    for rules in ({"include": ["*", "stem"]}, {"exclude": "stem"}, {"include": why.UNKNOWN}):
        (_, layer) = train(network, x, rewritten=rewritten, **rules)
        assert (layer.module, layer.reason) == (why.UNKNOWN, why.NAME_NOT_KNOWN)


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3)
        self.layers = nn.ModuleList(conv() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = run_region(layer, x)
        return x


@torch.compiler.nested_compile_region
def run_region(layer, x):
    return layer(x).relu()


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({}, ""),
        ({"include": "layers.*"}, ""),
        ({"exclude": "layers.?"}, why.EXCLUDED),
        ({"exclude": "layers.2"}, why.SHARED),
        ({"include": "layers.0"}, why.SHARED),
    ],
)
def test_layers_that_share_a_graph_are_pruned_together_or_not_at_all(rules, reason, x, rewritten):
    made = train(Regions(), x, rewritten=rewritten, **rules)
    shared = [d for d in made if d.module != "stem"]
    assert {d.module for d in shared} == {"layers.0, layers.1, layers.2"}
    assert {d.reason for d in shared} == {reason}
    assert [d.module for d in made if d.reason == why.NO_INPUT_GRADIENT] == ["stem"]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3), conv(), conv()

    def forward(self, x):
        x = self.stem(x)
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))


def test_no_name_is_made_up_for_a_layer_in_a_branch(x):
    """A branch is a graph of its own, whose inputs are not those of Dynamo's graph."""
    found = names_of_convolutions(Branches(), x)
    assert sorted(found) == [(), (), ("stem",)]


def test_a_layer_that_another_pass_has_replaced_goes_by_its_weight(x, rewritten, monkeypatch):
    """Such a pass of Inductor's multiplies the weight of a convolution by that of its norm."""
    options = {**EAGER, "sdgp.inner": "inductor", "efficient_conv_bn_eval_fx_passes": True}
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx_inner", lambda gm, *args, **kwargs: gm.forward
    )
    network = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.BatchNorm2d(8)).eval()
    torch.compile(network, backend="sdgp", options={**options, "sdgp.exclude": "2"})(x)
    ((graph, made),) = rewritten
    assert [(d.module, d.reason) for d in made] == [
        ("2", why.EXCLUDED),
        ("0", why.NO_INPUT_GRADIENT),
    ]
    layer, _ = find_convolutions(graph)
    assert not layer.node.meta.get("fwd_nn_module_stack")


def test_names_keep_no_model_alive(x):
    network = GetsAttributes()
    gone, names = weakref.ref(network), []
    torch.compile(network, backend=lambda gm, _: names.append(module_names(gm)) or gm.forward)(x)
    torch._dynamo.reset()
    del network
    gc.collect()
    assert names[0].layers
    assert gone() is None


@pytest.mark.parametrize(
    "path",
    [
        "layer1.0.conv1",
        "L['self'].layer1.0.conv1",
        "getattr(L['self'].layer1, '0').conv1",
        "getattr(getattr(L['fn'], 'layer1'), '0').conv1",
        "L['model']._modules['layer1']._modules['0'].conv1",
        "L['self'].__dict__['_modules']['layer1'].0.conv1",
        "L['model'].layer1[0].conv1",
        "L['self'].layer1._orig_mod.0._orig_mod.conv1",
        "L['self'].layer1.0.forward.__self__.conv1",
    ],
)
def test_name_from_a_path(path):
    assert module_name(path) == "layer1.0.conv1"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self']", ""),
        ("G['model'].0", "0"),
        ("""L['self'].d._modules["e'f"]""", "d.e'f"),
        ("""L['self'].d._modules["e'f"].0.1""", "d.e'f.0.1"),
        ("L['self'].d._modules['g[0]'].conv", "d.g[0].conv"),
        ("L['self'].d._modules2", "d._modules2"),
        ("L['self'].stem.block1-0.proj.0", "stem.block1-0.proj.0"),
    ],
)
def test_name_from_a_path_of_odd_keys(path, name):
    assert module_name(path) == name


def test_names_outside_of_dynamo_are_those_of_paths():
    gm = torch.fx.symbolic_trace(nn.Sequential(conv(3)))
    assert module_names(gm) == ModuleNames()
