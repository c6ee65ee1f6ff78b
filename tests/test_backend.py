"""Test torch.compile(..., backend="sdgp"): options, inner compilers, caches, shapes, randomness."""

import functools
import json
import os
import subprocess
import sys
import textwrap
import uuid
import warnings

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

import sdgp_fx
from sdgp_fx import SDGPConfig, graph_pass
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.module_names import ModuleNames

EAGER = {"sdgp.inner": "aot_eager"}


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


@pytest.fixture
def model():
    model = small_model()
    model(torch.randn(1, 3, 12, 12))
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 12, 12)


def gradients(model, x, **kwargs):
    """Return the gradients of one step of a freshly compiled model, by parameter name."""
    torch._dynamo.reset()
    model.zero_grad()
    torch.compile(model, **kwargs)(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def sdgp_gradients(model, x, **options):
    keys = {f"sdgp.{key}": value for key, value in options.items()}
    return gradients(model, x, backend="sdgp", options={**EAGER, **keys})


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sdgp.n": 5}, r"sdgp\.n: expected 1 <= n <= sdgp\.m = 4, got 5"),
        ({"sdgp.prune": "best"}, r"sdgp\.prune: expected one of .* got 'best'"),
        ({"sdgp.nn": 5}, r"sdgp\.nn: expected one of sdgp\.n, .* got an unknown name"),
    ],
)
def test_bad_options_are_value_errors_before_anything_is_compiled(
    model, x, options, words, rewritten, monkeypatch
):
    def compile_fx(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    with pytest.raises(ValueError, match=words):
        torch.compile(model, backend="sdgp", options=options)(x)
    assert not rewritten


def test_environment(model, x, rewritten, monkeypatch):
    monkeypatch.setenv("SDGP_INNER", "aot_eager")
    monkeypatch.setenv("SDGP_N", "1")
    gradients(model, x, backend="sdgp")
    (graph, _), *_ = rewritten
    assert {n.args[2] for n in graph.find_nodes(op="call_function", target=PRUNE_NM)} == {1}


@pytest.fixture
def patches(monkeypatch):
    """Return the configuration that Inductor is called with, and compile nothing."""
    seen = {}

    def compile_fx(gm, inputs, config_patches=None, **kwargs):
        seen.update(config_patches or {}, **kwargs)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen


def test_foreign_options_reach_inductor(model, x, patches):
    options = {"sdgp.n": 1, "epilogue_fusion": False}
    torch.compile(model, backend="sdgp", options=options)(x)
    assert patches["epilogue_fusion"] is False
    assert patches["joint_custom_pre_pass"].config == SDGPConfig(n=1)
    assert not any(key.startswith("sdgp") for key in patches)


def test_mode_reaches_inductor_with_settings_from_the_environment(model, x, patches, monkeypatch):
    """torch.compile takes a mode or options, not both."""
    monkeypatch.setenv("SDGP_N", "1")
    torch.compile(model, backend="sdgp", mode="max-autotune")(x)
    expected = torch._inductor.list_mode_options("max-autotune")
    assert expected.items() <= patches.items()
    assert patches["joint_custom_pre_pass"].config == SDGPConfig(n=1)


def test_foreign_options_are_checked_by_inductor(model, x):
    with pytest.raises(Exception, match="Unexpected optimization option no_such_option"):
        torch.compile(model, backend="sdgp", options={"no_such_option": 1})(x)


def test_aot_eager_says_what_it_ignores(model, x, monkeypatch):
    options = {**EAGER, "epilogue_fusion": False}
    with pytest.warns(UserWarning, match="'aot_eager' ignores epilogue_fusion=False"):
        torch.compile(model, backend="sdgp", options=options)(x)
    torch._dynamo.reset()
    monkeypatch.setenv("SDGP_INNER", "aot_eager")
    with pytest.warns(UserWarning, match="'aot_eager' ignores mode='max-autotune'"):
        torch.compile(model, backend="sdgp", mode="max-autotune")(x)


class Counting(CustomGraphPass):
    """A user's pass, in the place in Inductor that the backend needs too."""

    def __init__(self, uuid="user"):
        self.calls, self.key = 0, uuid

    def __call__(self, graph):
        self.calls += 1
        # It runs first: the convolutions are still whole.
        assert not graph.find_nodes(op="call_function", target=PRUNE_NM)

    def uuid(self):
        return self.key


def test_a_pass_of_the_users_runs_too(model, x, patches):
    user = Counting()
    torch.compile(model, backend="sdgp", options={"joint_custom_pre_pass": user})(x)
    combined = patches["joint_custom_pre_pass"]
    assert combined.before == (user,)
    alone = graph_pass.PruneInputGrads(SDGPConfig())
    assert combined.uuid() != alone.uuid()
    assert graph_pass.PruneInputGrads(SDGPConfig(), [Counting(None)]).uuid() is None
    assert graph_pass.PruneInputGrads(SDGPConfig(), [print]).uuid() is None
    combined(torch.fx.Graph())
    assert user.calls == 1


EXCLUDE = SDGPConfig(exclude="a")


def test_cache_key_has_all_that_decides_code():
    settings = [
        {},
        {"config": SDGPConfig(layers="profitable")},
        {"config": SDGPConfig(structure="channel")},
        {"config": SDGPConfig(structure="channel", prune="mvue")},
        {"config": SDGPConfig(targets="conv,linear")},
        {"config": EXCLUDE, "names": ModuleNames(calls=("a",))},
        {"config": EXCLUDE, "names": ModuleNames(calls=("b",))},
        {"config": EXCLUDE, "names": ModuleNames(calls=(None,))},
        {"config": EXCLUDE, "names": ModuleNames(calls=("a", "b", "a"))},
        {"config": EXCLUDE, "names": ModuleNames(calls=("a", "b", "b"))},
        {"config": EXCLUDE, "names": ModuleNames(owners=(frozenset("a"),))},
        {"config": EXCLUDE, "names": ModuleNames(owners=(frozenset("a"), frozenset("b")))},
        {"config": EXCLUDE, "names": ModuleNames(owners=(frozenset("ab"),))},
        {"config": EXCLUDE, "names": ModuleNames(frame="a")},
        {"config": EXCLUDE, "names": ModuleNames(frame=None)},
        {"config": EXCLUDE, "names": ModuleNames(shared={"0": ("a", "b")})},
        {"monitor": "0"},
        {"monitor": "1"},
        {"monitor": "1", "names": ModuleNames(calls=("a",))},
        {"dense_half_first": ["cpu"]},
        {"dense_half_first": ["cpu", "cuda"]},
        {"before": [Counting("a")]},
        {"before": [Counting("a"), Counting("b")]},
    ]

    def key(config=SDGPConfig(), **rest):  # noqa: B008
        return graph_pass.PruneInputGrads(config, **rest).uuid()

    assert len({key(**setting) for setting in settings}) == len(settings)
    # Nothing else changes the key: no order of sets, no form of a value, no earlier runs, names
    # only where there are rules, and no identities of modules.
    assert key(dense_half_first=["a", "b"]) == key(dense_half_first={"b", "a"})
    assert key(names=ModuleNames(calls=("a",))) == key()
    here, there = (ModuleNames(modules={i: "a"}, shared={i: ("b", "c")}) for i in ("1", "2"))
    assert key(EXCLUDE, names=here) == key(EXCLUDE, names=there)
    assert key(SDGPConfig(targets=["linear", "conv"])) == key(SDGPConfig(targets="conv,linear"))
    used = graph_pass.PruneInputGrads(SDGPConfig())
    used(torch.fx.Graph())
    assert used.uuid() == key()


def test_inductor_runs_the_pass_itself_and_no_copy(model, x, unseen):
    """The pass counts its runs, which tells a cache hit."""
    passes = []
    make = graph_pass.PruneInputGrads.__init__

    def spy(self, *args, **kwargs):
        make(self, *args, **kwargs)
        passes.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_pass.PruneInputGrads, "__init__", spy)
        for _ in range(2):
            sdgp_gradients(model, x, inner="inductor", exclude=unseen)
    missed, hit = passes
    assert (missed.runs, hit.runs) == (1, 0)


def test_pass_in_inductors_own_config_runs_too(model, x, patches):
    user = Counting()
    with torch._inductor.config.patch(joint_custom_pre_pass=user):
        torch.compile(model, backend="sdgp")(x)
    assert patches["joint_custom_pre_pass"].before == (user,)


# Pruned gradients


def test_every_gradient_that_depends_on_no_pruned_one_is_bit_identical(model, x):
    dense = gradients(model, x, backend="aot_eager")
    pruned = sdgp_gradients(model, x)
    for name in ("5.weight", "5.bias", "7.weight", "7.bias"):
        assert torch.equal(pruned[name], dense[name])
    for name in ("3.weight", "1.weight", "0.weight"):
        assert not torch.equal(pruned[name], dense[name])


def test_decisions_and_edges(model, x, rewritten):
    sdgp_gradients(model, x)
    ((graph, decisions),) = rewritten
    assert [(d.module, d.pruned) for d in decisions] == [("5", True), ("3", True), ("0", False)]
    for node in graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD):
        assert (node.args[0].target is PRUNE_NM) == node.args[10][0]


def test_inference_and_no_grad_are_untouched(model, x, rewritten):
    expected = model.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(model, backend="sdgp", options=EAGER)
        with torch.no_grad():
            assert torch.equal(compiled(x), expected)
        with torch.inference_mode():
            assert torch.equal(compiled(x), expected)
    assert all(not graph.find_nodes(op="call_function", target=PRUNE_NM) for graph, _ in rewritten)


def test_forward_is_untouched(model, x):
    expected = torch.compile(model, backend="aot_eager")(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="sdgp", options=EAGER)(x), expected)


@pytest.mark.parametrize("gradients", ["backward", "all"])
def test_gradients_taken_inside_the_compiled_function(model, x, rewritten, gradients):
    """There is no joint graph here: the backward is part of an inference graph."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(parameters, x):
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum()

    model.eval()
    options = {**EAGER, "sdgp.gradients": gradients}
    step = torch.compile(torch.func.grad(loss), backend="sdgp", options=options)
    result, dense = step(parameters, x), torch.func.grad(loss)(parameters, x)
    is_pruned = gradients == "all"
    assert sum(d.pruned for _, decisions in rewritten for d in decisions) == 2 * is_pruned
    assert torch.allclose(result["5.weight"], dense["5.weight"])
    assert torch.allclose(result["0.weight"], dense["0.weight"]) != is_pruned


@pytest.mark.parametrize(
    ("make", "shape", "why"),
    [
        (lambda: nn.Linear(4, 4), (2, 4), "it has no layer of the kind that is pruned"),
        (lambda: nn.Conv2d(3, 8, 3), (2, 3, 5, 5), "1 x no input gradient"),
    ],
)
def test_one_warning_where_nothing_is_pruned(make, shape, why):
    with pytest.warns(UserWarning, match="sdgp pruned nothing") as caught:
        torch.compile(make(), backend="sdgp", options=EAGER)(torch.randn(shape)).sum().backward()
    (warning,) = [w for w in caught if "sdgp" in str(w.message)]
    assert why in str(warning.message)


def test_no_warning_where_something_is_pruned(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sdgp_gradients(model, x)


# Randomness


@pytest.mark.parametrize(
    ("prune", "inner"),
    [("random", "aot_eager"), ("mvue", "aot_eager"), ("mvue", "inductor")],
)
def test_manual_seed_repeats_and_steps_differ(model, x, prune, inner):
    options = {"sdgp.prune": prune, "sdgp.inner": inner}
    compiled = torch.compile(model, backend="sdgp", options=options)

    def step():
        model.zero_grad()
        compiled(x).square().sum().backward()
        return model[0].weight.grad.clone()

    torch.manual_seed(3)
    first, second = step(), step()
    torch.manual_seed(3)
    assert torch.equal(step(), first)
    assert torch.equal(step(), second)
    assert not torch.equal(first, second)


def test_mvue_is_unbiased_through_the_whole_backward(model, x):
    """The network is linear in the gradient between the last layer and the first."""
    linear = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    compiled = torch.compile(linear, backend="sdgp", options={**EAGER, "sdgp.prune": "mvue"})
    dense = torch.autograd.grad(linear(x).sin().sum(), linear[0].weight)[0]
    total, steps = torch.zeros_like(dense), 200
    spread = torch.zeros_like(dense)
    for _ in range(steps):
        grad = torch.autograd.grad(compiled(x).sin().sum(), linear[0].weight)[0]
        total += grad
        spread += (grad - dense).square()
    deviation = (spread / steps).sqrt() / steps**0.5
    assert ((total / steps - dense).abs() / deviation).max() < 5
    assert deviation.max() > 0


# Shapes


def train_on_sizes(model, **kwargs):
    """Train on three sizes with dynamic=True; return the number of graphs and the gradients."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, dynamic=True, **kwargs)
    grads = []
    for batch in (2, 3, 7):
        model.zero_grad()
        torch.manual_seed(batch)
        compiled(torch.randn(batch, 3, 8 + batch, 9)).sin().sum().backward()
        grads.append(model[2].weight.grad.clone())
    return counters["stats"]["unique_graphs"], grads


def two_convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


@functools.cache
def stock_on_sizes(inner):
    return train_on_sizes(two_convolutions(), backend=inner)


@pytest.mark.parametrize(
    ("inner", "setting"),
    [
        ("aot_eager", {}),
        ("aot_eager", {"sdgp.rescale": "channel"}),
        ("aot_eager", {"sdgp.prune": "mvue"}),
        ("inductor", {}),
    ],
)
def test_dynamic_shapes_compile_as_often_as_stock(inner, setting, rewritten):
    """They compile once, except with Inductor of torch 2.11 on the CPU.

    That one fixes the sizes of convolutions.
    """
    options = {"sdgp.inner": inner, **setting}
    # A hit in the caches would not go through the pass.
    with inductor_config.patch(fx_graph_cache=False):
        stock, dense = stock_on_sizes(inner)
        count, grads = train_on_sizes(two_convolutions(), backend="sdgp", options=options)
    assert count == stock
    for grad, expected in zip(grads, dense, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    for _, decisions in rewritten:
        assert [d.pruned for d in decisions] == [True, False]
        assert decisions[0].grad_output_shape[1] == 8
        assert stock > 1 or isinstance(decisions[0].grad_output_shape[0], str)


def test_channels_last_stays_channels_last(rewritten):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend="sdgp", options=EAGER)
    compiled(x).backward(torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last))
    (graph, _), *_ = rewritten
    (node,) = graph.find_nodes(op="call_function", target=PRUNE_NM)
    assert node.meta["val"].stride() == node.args[0].meta["val"].stride()


# Inductor


@pytest.mark.parametrize("rescale", ["group", "channel"])
def test_inductor_agrees_with_aot_eager(model, x, rescale):
    """Seeds are chosen so that no two values are nearly equal, where magnitude selection flips.

    The networks are small enough for no such pair to occur.
    """
    eager = sdgp_gradients(model, x, rescale=rescale)
    inductor = sdgp_gradients(model, x, rescale=rescale, inner="inductor")
    for name, grad in eager.items():
        torch.testing.assert_close(inductor[name], grad, rtol=1e-4, atol=1e-4)


def test_inductor_keeps_last_gradients_within_rounding_of_stock(model, x):
    dense = gradients(model, x, backend="inductor")
    pruned = sdgp_gradients(model, x, inner="inductor")
    for name in ("5.weight", "5.bias"):
        torch.testing.assert_close(pruned[name], dense[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pruned["0.weight"], dense["0.weight"], rtol=1e-2)


# Caches


def cache_use(model, x, **options):
    """Count the misses and hits of one compilation in Inductor's and AOTAutograd's caches."""
    counters.clear()
    sdgp_gradients(model, x, inner="inductor", **options)
    names = ("fxgraph_cache_miss", "fxgraph_cache_hit")
    use = {name: counters["inductor"][name] for name in names}
    names = ("autograd_cache_miss", "autograd_cache_hit")
    return use | {name: counters["aot_autograd"][name] for name in names}


HIT = {"autograd_cache_hit": 1, "autograd_cache_miss": 0, "fxgraph_cache_miss": 0}


def is_hit(use):
    return HIT.items() <= use.items()


def is_miss(use):
    return (
        use["autograd_cache_hit"] == use["fxgraph_cache_hit"] == 0
        and use["autograd_cache_miss"] == 1
        and use["fxgraph_cache_miss"] > 0
    )


@pytest.fixture
def unseen():
    """Return a setting that no cache has seen, whatever is in the caches of this machine."""
    return f"no layer {uuid.uuid4()}"


def test_unchanged_hits_and_changed_options_miss(model, x, unseen):
    assert is_miss(cache_use(model, x, exclude=unseen))
    assert is_hit(cache_use(model, x, exclude=unseen))
    for options in ({"n": 1}, {"include": "3"}):
        assert not is_hit(cache_use(model, x, exclude=unseen, **options)), options
        assert is_hit(cache_use(model, x, exclude=unseen, **options)), options


def test_cached_graph_is_the_pruned_one(model, x, unseen):
    options = {"inner": "inductor", "exclude": unseen}
    first = sdgp_gradients(model, x, **options)
    other = sdgp_gradients(model, x, **options, n=1)
    stock = gradients(model, x, backend="inductor")
    counters.clear()
    again = sdgp_gradients(model, x, **options)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    for name in first:
        assert torch.equal(again[name], first[name])
    for different in (other, stock):
        assert not torch.equal(different["0.weight"], first["0.weight"])


def test_changed_source_misses(model, x, unseen, tmp_path, monkeypatch):
    cache_use(model, x, exclude=unseen)
    assert is_hit(cache_use(model, x, exclude=unseen))
    changed = tmp_path / "prune_input_grads.py"
    changed.write_text(f"# {unseen}")
    monkeypatch.setattr(graph_pass, "_SOURCES", (*graph_pass._SOURCES, str(changed)))
    assert not is_hit(cache_use(model, x, exclude=unseen))


class Given(nn.Module):
    def forward(self, x, weight):
        return nn.functional.conv2d(x, weight)


class Hyper(nn.Module):
    """Give a weight to a module that has none, so that the graph is the same for any name."""

    def __init__(self, names, weight_in=""):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.names = nn.Conv2d(3, 8, 3), names
        for name in names:
            self.add_module(name, Given())
        if weight_in:
            self.add_module(weight_in, nn.Module())
        self.holder = [self.get_submodule(weight_in)]
        self.holder[0].weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        for name in self.names:
            x = self._modules[name](x, self.holder[0].weight)
        return x


class ByWeight(Hyper):
    def forward(self, x):
        return nn.functional.conv2d(self.stem(x), self.holder[0].weight)


@pytest.mark.parametrize(
    ("excluded", "other"),
    [
        (lambda: Hyper(["neck"]), lambda: Hyper(["body"])),
        (lambda: ByWeight([], "neck"), lambda: ByWeight([], "body")),
    ],
)
def test_no_cache_serves_what_was_decided_for_other_names(excluded, other, x, unseen):
    """Their graphs are the same."""
    excluded, other = excluded(), other()
    rules = {"inner": "inductor", "exclude": ["neck", unseen]}
    dense = gradients(excluded, x, backend="inductor")["stem.weight"]
    first = sdgp_gradients(excluded, x, **rules)["stem.weight"]
    counters.clear()
    second = sdgp_gradients(other, x, **rules)["stem.weight"]
    assert counters["aot_autograd"]["autograd_cache_hit"] == 0
    torch.testing.assert_close(first, dense, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(second, dense, rtol=1e-2)
    counters.clear()
    sdgp_gradients(other, x, **rules)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1


def test_every_source_counts():
    package = os.path.dirname(sdgp_fx.__file__)
    names = {os.path.relpath(path, package) for path in graph_pass._SOURCES}
    expected = {"backend.py", "config.py", "passes/prune_input_grads.py", "kernels/op.py"}
    expected |= {"graph_pass.py", "inductor/lowering.py"}
    assert expected | {"kernels/reference.py", "kernels/triton_prune.py"} <= names


SECOND_PROCESS = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
assert "sdgp_fx" not in sys.modules
torch.compile(model, backend="sdgp", options={"sdgp.prune": "mvue"})(
    torch.randn(2, 3, 9, 9)
).square().sum().backward()
print(json.dumps({
    "imported": "sdgp_fx" in sys.modules,
    "hit": counters["aot_autograd"]["autograd_cache_hit"],
    "miss": counters["inductor"]["fxgraph_cache_miss"],
    "last": model[2].weight.grad.sum().item(),
    "first": model[0].weight.grad.sum().item(),
}))
"""


def run_process(code, **environment):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_backend_by_name_without_an_import_and_a_second_process_from_cache(unseen):
    first = run_process(SECOND_PROCESS, SDGP_EXCLUDE=unseen)
    assert first["imported"]
    assert first["hit"] == 0
    assert first["miss"] > 0
    second = run_process(SECOND_PROCESS, SDGP_EXCLUDE=unseen)
    assert (second["hit"], second["miss"]) == (1, 0)
    assert (second["last"], second["first"]) == (first["last"], first["first"])
    model = two_convolutions()
    model(torch.randn(2, 3, 9, 9)).square().sum().backward()
    last, first_layer = (model[i].weight.grad.sum().item() for i in (2, 0))
    assert last == pytest.approx(first["last"], rel=1e-4)
    assert first_layer != pytest.approx(first["first"], rel=1e-3)
