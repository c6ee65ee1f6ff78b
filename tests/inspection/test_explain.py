"""Test the report of explain: what it counts, what it leaves alone, and how it is shown."""

import dataclasses
import functools
import gc
import html
import json
import logging
import random
import re
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn
from torch._dynamo.eval_frame import cached_backends
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import sdgp_fx
from sdgp_fx import Explanation, explain
from sdgp_fx.cli import main as command
from sdgp_fx.inspection import dry_run
from sdgp_fx.inspection.explain import NO_GRADIENT, NOT_COMPILED, NOT_KNOWN, NOT_RUN
from sdgp_fx.inspection.report import KEPT, SAVED
from sdgp_fx.inspection.weights import OTHER_OPERATORS
from sdgp_fx.measurement.networks import Uninitialized
from sdgp_fx.passes.decisions import UNKNOWN

BOTH = {"sdgp.targets": "conv,linear"}


# Multiply-adds


def counted(layer, x):
    """Count forward, input gradient and weight gradient of a layer with torch's own counter."""
    counts = []
    for input_trains, weight_trains in ((False, False), (True, False), (False, True)):
        x = x.detach().requires_grad_(input_trains)
        layer.weight.requires_grad = weight_trains
        layer.bias = None
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
            if y.requires_grad:
                y.sum().backward()
        counts.append(counter.get_total_flops() // 2)
    forward, *both = counts
    return [forward, *(count - forward for count in both)]


LAYERS = {
    "conv2d": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 8)),
    "conv2d, strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 8)),
    "conv2d, dilated": (nn.Conv2d(6, 8, 3, dilation=2), (2, 6, 9, 8)),
    "conv1d": (nn.Conv1d(6, 8, 5, stride=3), (2, 6, 20)),
    "conv3d": (nn.Conv3d(3, 8, (1, 2, 3)), (2, 3, 4, 5, 6)),
    "conv_transpose1d": (nn.ConvTranspose1d(6, 8, 4, stride=2), (2, 6, 7)),
    "conv_transpose2d": (nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1), (2, 6, 5, 4)),
    "linear": (nn.Linear(6, 8), (5, 6)),
    "linear of positions": (nn.Linear(6, 8), (2, 3, 5, 6)),
    "linear without bias": (nn.Linear(6, 8, bias=False), (2, 3, 6)),
}


class Many(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs):
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def explained(layers, shapes, **options):
    """Explain layers side by side, and return their rows."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    options = {f"sdgp.{name}": value for name, value in options.items()}
    rows = {row.module: row for row in explain(Many(layers), *inputs, options={**BOTH, **options})}
    return [rows[f"layers.{i}"] for i in range(len(layers))]


def test_multiply_adds_are_those_that_torch_counts():
    layers, shapes = zip(*LAYERS.values(), strict=True)
    rows = explained(layers, shapes)
    for (name, (layer, shape)), row in zip(LAYERS.items(), rows, strict=True):
        assert row.pruned, name
        forward, input_gradient, weight_gradient = counted(layer, torch.randn(shape))
        expected = (forward, input_gradient, weight_gradient, input_gradient // 2)
        assert dataclasses.astuple(row.multiply_adds) == expected, name
        assert re.match(row.operation, name)


def test_groups_are_so_many_small_layers():
    """torch's counter takes the weight gradient of a grouped convolution for an ungrouped one."""
    shape = (2, 12, 7, 7)
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    rows = explained([kind(12, 16, 3, stride=2, groups=4) for kind in kinds], [shape] * 2, n=1)
    for kind, row in zip(kinds, rows, strict=True):
        small = counted(kind(3, 4, 3, stride=2), torch.randn(shape)[:, :3])
        forward, input_gradient, weight_gradient = (4 * count for count in small)
        expected = (forward, input_gradient, weight_gradient, input_gradient * 3 // 4)
        assert dataclasses.astuple(row.multiply_adds) == expected, kind
        assert row.groups == 4


def test_only_gradients_that_are_computed_count():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(32, 4), nn.Linear(4, 2)
    )
    model[1].weight.requires_grad = False
    model[3].requires_grad_(False)
    rows = explain(model, torch.randn(5, 3, 2, 2), options=BOTH)
    counts = {row.module: dataclasses.astuple(row.multiply_adds) for row in rows}
    assert counts == {
        "0": (240, 0, 240, 0),
        "1": (640, 640, 0, 320),
        "3": (640, 640, 0, 320),
        "4": (40, 40, 40, 0),
    }
    assert rows[-1].reason == "C_out per group is not a multiple of m"
    assert dataclasses.astuple(rows.multiply_adds) == (1560, 1320, 280, 640)


# Layers the backend doesn't get


class Broken(nn.Module):
    """Model whose parts run in graphs, in eager mode, without a gradient, or not at all."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Conv2d(3, 8, 1).requires_grad_(False)
        self.stem = nn.Conv2d(8, 8, 1)
        self.stage = nn.ModuleList([nn.Conv2d(8, 8, 1)])
        self.eager = nn.Conv2d(8, 8, 3)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.eager_head = nn.Linear(8, 4)
        self.unused = nn.Conv1d(8, 8, 1)

    def forward(self, x):
        x = self.stem(self.frozen(x))
        stage = self.stage
        torch._dynamo.graph_break()
        for layer in stage:
            x = layer(x)
        return self.tail(x)

    @torch.compiler.disable
    def tail(self, x):
        return self.eager_head(self.scaled(self.eager(x)).mean((2, 3)))


def test_layers_that_the_backend_does_not_get_are_listed_as_such():
    rows = explain(Broken(), torch.randn(2, 3, 4, 4), options=BOTH)
    reasons = {row.module: row.reason for row in rows}
    assert reasons == {
        "stem": "no input gradient",
        "stage.0": "",
        "eager": NOT_COMPILED,
        "scaled": NOT_COMPILED,
        "eager_head": NOT_COMPILED,
        "frozen": NO_GRADIENT,
        "unused": NOT_RUN,
    }
    by_name = {row.module: row for row in rows}
    assert {row.module for row in rows if row.compiled} == {"stem", "stage.0", "frozen"}
    count = 2 * 8 * 8 * 9 * 2 * 2
    assert dataclasses.astuple(by_name["eager"].multiply_adds) == (count, count, count, 0)
    assert by_name["eager"].grad_output_shape == (2, 8, 2, 2)
    assert dataclasses.astuple(by_name["eager_head"].multiply_adds) == (64, 64, 64, 0)
    assert dataclasses.astuple(by_name["frozen"].multiply_adds) == (2 * 16 * 24, 0, 0, 0)
    assert dataclasses.astuple(by_name["unused"].multiply_adds) == (0, 0, 0, 0)
    assert by_name["scaled"].multiply_adds.forward is None
    assert any("1 layers are not known" in warning for warning in rows.warnings)
    reasons = [graph_break.reason for graph_break in rows.graph_breaks]
    assert any("graph_break" in reason for reason in reasons)
    assert rows.graph_breaks[0].place.startswith("test_explain.py:")
    assert "graph break: test_explain.py:" in str(rows)


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.first(x)
        if x.mean() > 0:
            x = x * x.sum().item()
        return self.last(x)


class Selecting(Asking):
    def forward(self, x):
        x = self.first(x)
        return self.last(x[x.sum((1, 2, 3)) > 0])


def test_a_model_that_asks_for_values_gets_one():
    rows = explain(Asking(), torch.randn(2, 3, 4, 4))
    assert [(row.module, row.pruned) for row in rows] == [("first", False), ("last", True)]
    assert any("asks for values" in warning for warning in rows.warnings)


@pytest.mark.parametrize("is_captured", [False, True])
def test_sizes_that_depend_on_data(is_captured):
    """Such sizes are symbols in the graph; outside of it, explain can't tell how to go on."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=is_captured):
        rows = explain(Selecting(), torch.randn(2, 3, 4, 4))
    by_name = {row.module: row for row in rows}
    last = by_name["last"]
    if is_captured:
        assert last.pruned
        assert isinstance(last.grad_output_shape[0], str)
        assert last.multiply_adds.saved is None
    else:
        assert last.reason == NOT_KNOWN
        assert any("could not follow" in warning for warning in rows.warnings)
    assert json.loads(json.dumps(rows.to_dict()))["layers"][0]["module"] == "first"
    assert "?" in str(rows) or not is_captured


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.yes, self.no = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.first(x)
        x = torch.cond(
            x.sum() > 0, lambda x: self.yes(x).clone(), lambda x: self.no(x).clone(), (x,)
        )
        return self.last(x)


@torch.compiler.nested_compile_region
def region(layer, x):
    return layer(x).relu()


class Regions(Conditional):
    def forward(self, x):
        return self.last(self.no(region(self.yes, self.first(x))))


@torch.library.custom_op("sdgp_tests::decay", mutates_args={"x"})
def decay(x: torch.Tensor) -> None:
    x.mul_(0.9)


@decay.register_fake
def _(x):
    pass


class Mutating(Conditional):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x):
        with torch.no_grad():
            torch.ops.sdgp_tests.decay(self.mean)
        x = self.first(x) * self.mean[:, None, None]
        return self.last(self.no(self.yes(x)))


class Length(Conditional):
    """A length that is computed as a tensor; the kernel is larger than one that is guessed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("extra", torch.tensor(1))

    def forward(self, x):
        x = self.first(x)
        end = x.shape[-1] - self.extra
        torch._dynamo.graph_break()
        x = nn.functional.conv2d(x[..., :end], torch.ones(8, 8, 3, 3), padding=(1, 0))
        return self.last(self.no(self.yes(x)))


class Scripted(Conditional):
    def __init__(self):
        super().__init__()
        self.yes = torch.jit.script(self.yes)

    def forward(self, x):
        return self.last(self.no(self.yes(self.first(x))))


class Locked(Conditional):
    """What can't be copied, and a tensor that is held in no list of the module's."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            x = self.first(x)
        return self.last(self.no(self.yes(x * SCALE)))


SCALE = torch.ones(8, 1, 1)


@pytest.mark.parametrize(
    "model", [Conditional, Regions, Mutating, Length, Scripted, Locked], ids=lambda m: m.__name__
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_models_that_are_compiled_are_explained(model):
    """They have a row for each layer, and are pruned where a compilation prunes."""
    model = model()
    rows = explain(model, x_of(3), options={"sdgp.inner": "aot_eager"})
    names = [row.module for row in rows]
    assert sorted(names) == ["first", "last", "no", "yes"]
    assert not rows.warnings
    with sdgp_fx.capture() as captured:
        compiled = torch.compile(model, backend="sdgp", options={"sdgp.inner": "aot_eager"})
        compiled(x_of(3)).sum().backward()
    decisions = [decision for graph in captured for decision in graph.decisions]
    assert sum(row.compiled for row in rows) == len(decisions)
    assert {row.reason for row in rows if not row.compiled} <= {NOT_COMPILED}
    reasons = {row.module: row.reason for row in rows}
    assert all(reasons[d.module] == d.reason for d in decisions if d.module != UNKNOWN)
    assert sum(row.pruned for row in rows) == sum(d.pruned for d in decisions)


def test_lazy_modules_are_explained_and_stay_lazy():
    model = nn.Sequential(nn.LazyConv2d(8, 1), nn.LazyConv2d(8, 1), nn.LazyConv2d(8, 1))
    rows = explain(model, x_of(3))
    assert [row.pruned for row in rows] == [False, True, True]
    assert rows[1].weight_shape == (8, 8, 1, 1)
    assert all(isinstance(part, nn.LazyConv2d) for part in model)
    assert all(map(nn.parameter.is_lazy, model.parameters()))


@dataclasses.dataclass
class Batch:
    images: torch.Tensor
    scales: list


class Taking(Asking):
    def forward(self, batch, *, shift, missing=None):
        return self.last(self.first(batch.images * batch.scales[0])) + shift


def test_tensors_in_objects_and_keywords():
    batch = Batch(x_of(3), [torch.ones(2, 1, 1, 1)])
    (first, last) = explain(Taking(), batch, shift=torch.ones(8, 4, 4), options={"sdgp.n": 1})
    assert (first.input_shape, last.pruned) == ((2, 3, 4, 4), True)
    assert type(batch.images) is type(batch.scales[0]) is torch.Tensor
    with pytest.raises(TypeError, match="shift"):
        explain(Taking(), batch)


def test_inside_inference_mode():
    with torch.inference_mode():
        rows = explain(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), x_of(3))
        assert torch.is_inference_mode_enabled()
    assert [row.pruned for row in rows] == [False, True]
    assert any("inference mode" in warning for warning in rows.warnings)


class Guessing(Asking):
    def forward(self, x):
        x = self.first(x)
        return self.last(x[..., : int(x.sum())].reshape(2, 8, 4, 4))


@torch.compiler.disable
def mean(x):
    return float(x.detach().numpy().mean())


class Converting(Asking):
    def forward(self, x):
        x = self.first(x)
        return self.last(x * mean(x))


@pytest.mark.parametrize("model", [Guessing, Converting])
def test_what_cannot_be_followed_is_not_blamed_on_the_model(model):
    rows = explain(model(), x_of(3))
    assert {row.module: row.reason for row in rows}["last"] == NOT_KNOWN
    assert any("could not follow" in warning for warning in rows.warnings)


# Weights that other modules use


class Merging(nn.Module):
    """RepVGG, merged in training."""

    def __init__(self):
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.narrow, self.linear = nn.Conv2d(8, 8, 1), nn.Linear(8, 8)
        self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)

    def forward(self, x):
        weight = self.wide.weight + nn.functional.pad(self.narrow.weight, (1,) * 4)
        x = nn.functional.conv2d(self.first(self.frozen(x)), weight, padding=1)
        x = nn.functional.linear(x.mean((2, 3)), self.linear.weight)
        return x @ self.linear.weight.T


def test_a_weight_that_another_module_uses_is_listed_once():
    rows = explain(Merging(), x_of(3), options=BOTH)
    decisions = [(row.kind, row.decision) for row in rows]
    assert sorted(decisions) == [
        ("conv", f"dense: {NO_GRADIENT}"),
        ("conv", "dense: no input gradient"),
        ("conv", "pruned"),
        ("linear", "pruned"),
    ]
    assert {row.module: row.reason for row in rows}["frozen"] == NO_GRADIENT
    (merged,) = (row for row in rows if row.weight_shape == (8, 8, 3, 3))
    assert dataclasses.astuple(merged.multiply_adds)[0] == 2 * 8 * 8 * 9 * 4 * 4
    assert not rows.warnings


class Multiplying(Asking):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.first(x)).mean((2, 3)) @ self.linear.weight


def test_a_weight_with_a_gradient_that_is_no_layers_is_not_said_to_have_none():
    rows = explain(Multiplying(), x_of(3), options=BOTH)
    assert {row.module: row.reason for row in rows}["linear"] == OTHER_OPERATORS


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_graphs_are_those_of_the_inner_compiler(inner):
    """On a CPU, Inductor computes small products of one row without a matrix product."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    options = {"sdgp.targets": "linear", "sdgp.inner": inner}
    rows = explain(model, torch.randn(1, 8), options=options)
    torch.compile(model, backend="sdgp", options=options)
    with sdgp_fx.capture() as captured, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="sdgp", options=options)
        compiled(torch.randn(1, 8)).sum().backward()
    pruned = {decision.module for decision in captured[0].decisions if decision.pruned}
    assert {row.module for row in rows if row.pruned} == pruned
    assert pruned == ({"1"} if inner == "aot_eager" else set())
    if inner == "inductor":
        assert {row.reason for row in rows} == {OTHER_OPERATORS}


def test_evaluation_mode_and_models_without_layers_are_warned_about():
    assert any("evaluation" in w for w in explain(nn.Conv2d(4, 4, 1).eval(), x_of(4)).warnings)
    assert any("no layer" in w for w in explain(nn.BatchNorm2d(4), x_of(4)).warnings)
    assert not explain(nn.Conv2d(4, 4, 1), x_of(4)).warnings


def x_of(channels, batch=2):
    return torch.randn(batch, channels, 4, 4)


def test_errors_of_the_model_and_bad_options_are_raised():
    with pytest.raises(Exception, match="channels"):
        explain(nn.Conv2d(4, 4, 1), x_of(3))
    with pytest.raises(ValueError, match=r"sdgp\.n"):
        explain(nn.Conv2d(4, 4, 1), x_of(4), options={"sdgp.n": 7})


def test_a_module_with_two_names_and_a_compiled_part_are_there_once():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1))
    rows = explain(nn.Sequential(torch.compile(inner, backend="eager"), inner), x_of(4))
    assert [row.pruned for row in rows] == [False, True]
    assert {row.module for row in rows} <= {"0.0", "1.0"}
    compiled = torch.compile(nn.Sequential(nn.Conv2d(4, 4, 1)), backend="eager")
    assert [row.module for row in explain(compiled, x_of(4))] == ["0"]


# State that stays unchanged


class Halves(nn.Module):
    """Model with a graph break, so that Dynamo compiles the code of its forward."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.last(x)


class Drawing(nn.Module):
    """Model with random numbers of all kinds."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.nn.functional.dropout(self.norm(self.first(x)))
        return self.last(x) * (random.random() + np.random.rand() + torch.rand(1))


def states():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        {name: dict(counter) for name, counter in counters.items()},
        set(cached_backends),
    )


def entries(model):
    return torch._C._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__)


def test_nothing_of_the_model_or_of_random_states_or_counters_changes():
    model, x = Drawing(), x_of(3).requires_grad_()
    torch.compile(nn.ReLU(), backend="eager")(x)  # Makes counters that must be kept.
    before = states()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, x)
    assert states() == before
    assert before[3]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


KEPT_GLOBALLY = []
LATEST = None


class Keeping(Halves):
    """Model with hooks, and a method, that keep tensors outside of it."""

    def __init__(self):
        super().__init__()
        kept, self.seen = {"outputs": []}, []
        self.kept = lambda: kept
        self.first.register_forward_hook(lambda *_, into=kept: into["outputs"].append(_[-1]))
        self.first.register_forward_pre_hook(lambda _, args: KEPT_GLOBALLY.extend(args))
        self.last.register_forward_hook(self.see)

    def see(self, module, args, output):
        global LATEST
        LATEST = output
        self.seen.append(output)


@pytest.fixture
def _no_logs():
    """Log nothing: pytest keeps all that is logged, graphs included."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def fake_tensors(mode):
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), FakeTensor)]
    return [tensor for tensor in tensors if tensor.fake_mode is mode]


@pytest.mark.parametrize("model", [Keeping, Conditional, Guessing, Asking])
@pytest.mark.usefixtures("_no_logs")
def test_no_tensor_without_values_is_left(model, monkeypatch):
    """Not of explain's mode: the compiler itself keeps some of the latest compilation's."""
    made = []

    def make(**options):
        made.append(FakeTensorMode(**options))
        return made[0]

    monkeypatch.setattr(dry_run, "FakeTensorMode", make)
    model = model()
    hooks = [dict(part._forward_hooks) for part in model.modules()]
    rows = explain(model, x_of(3))
    assert len(made) == 1
    assert not fake_tensors(made[0])
    assert not any("left in" in warning for warning in rows.warnings)
    assert [dict(part._forward_hooks) for part in model.modules()] == hooks
    if isinstance(model, Keeping):
        assert model.kept() == {"outputs": []}
        assert (model.seen, KEPT_GLOBALLY, LATEST) == ([], [], None)
        model(x_of(3))
        assert len(model.kept()["outputs"]) == len(model.seen) == len(KEPT_GLOBALLY) == 1
        KEPT_GLOBALLY.clear()
        globals()["LATEST"] = None


@functools.lru_cache
def cached(channels):
    return torch.ones(channels, 1, 1)


class Caching(Asking):
    def forward(self, x):
        return self.last(self.first(x) * eagerly(8))


@torch.compiler.disable
def eagerly(channels):
    return cached(channels)


def test_what_is_left_is_said():
    rows = explain(Caching(), x_of(3))
    assert any("1 tensors without values are left" in warning for warning in rows.warnings)
    cached.cache_clear()


def test_later_compilations_are_as_if_there_had_been_no_explaining():
    """explain leaves no entries behind.

    Past a number of entries Dynamo compiles no more, and it makes sizes that change dynamic.
    """
    model = Halves()
    with torch._dynamo.config.patch(recompile_limit=2):
        for batch in range(2, 5):
            rows = explain(model, x_of(3, batch))
            names = [(row.module, row.grad_output_shape[0]) for row in rows if row.compiled]
            assert names == [("first", batch), ("last", batch)]
    assert entries(model) == []
    seen = []

    def backend(gm, inputs):
        seen.extend(x.shape for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4)
        return gm.forward

    torch.compile(model, backend=backend)(x_of(3, 20))
    assert len(entries(model)) == 1
    assert torch.Size([20, 3, 4, 4]) in seen
    assert all(isinstance(size, int) for shape in seen for size in shape)


def test_what_was_compiled_before_stays_compiled():
    model, counter = Halves(), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(x_of(3))
    frames, (entry,) = counter.frame_count, entries(model)
    for _ in range(2):
        assert len(explain(model, x_of(3))) == 2
    compiled(x_of(3))
    assert counter.frame_count == frames
    assert entry.code in {e.code for e in entries(model)}


def test_a_model_larger_than_the_memory_used():
    with Uninitialized():
        model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1 << 26, 1, bias=False))
    size = model[1].weight.nbytes
    assert size == 2**31
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (_, row) = explain(model, torch.randn(1, 1, 1, 1))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert row.pruned
    assert grown < size / 10


# Display


@pytest.fixture(scope="module")
def report():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1))
    return explain(model, x_of(3))


def test_a_report_is_a_sequence_of_layers(report):
    assert isinstance(report, Explanation)
    assert [layer.module for layer in report] == ["0", "1", "2"] == [r.module for r in report[:]]
    assert (report[1].pruned, report[1].reason, report[1].decision) == (True, "", "pruned")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report[0].pruned = True


def test_text_has_a_line_for_each_layer(report):
    header, *rows = [
        re.split(r"  +", line.strip()) for line in str(report).split("\n\n")[0].split("\n")
    ]
    assert rows[1] == [
        *("1", "conv2d", "8x8x1x1", "1", "2x8x4x4"),
        *("2.048 k", "2.048 k", "2.048 k", "1.024 k", "dense", "pruned"),
    ]
    assert len(header) == len(rows[1])
    assert "1 of 3 layers pruned" in str(report)
    assert "products of pruned layers: 0 of 1 sparse, which skip 0" in str(report)


def test_a_dictionary_has_all_fields_but_the_layer(report):
    plain = json.loads(json.dumps(report.to_dict()))
    for layer, row in zip(report, plain["layers"], strict=True):
        assert layer.layer is None
        names = {field.name for field in dataclasses.fields(layer)} - {"layer"}
        assert row.keys() == names
        assert row["multiply_adds"] == dataclasses.asdict(layer.multiply_adds)
        assert tuple(row["weight_shape"]) == layer.weight_shape
    assert plain["config"] == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(report.config).items()
    }


def test_rich_has_the_same_cells(report):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(report)
    (line,) = [x for x in captured.get().splitlines() if "1.024 k" in x and "│" in x]
    assert [cell.strip() for cell in line.strip("│").split("│")][1:3] == ["conv2d", "8x8x1x1"]


def test_html_is_escaped():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<b>", nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self._modules["<b>"](x)

    text = explain(Odd(), x_of(4))._repr_html_()
    assert "<b>" not in text
    assert html.escape("<b>") in text
    assert text.count("<tr>") == 2


def test_the_picture_shows_what_is_saved(report, tmp_path):
    report.plot(tmp_path / "p.png")
    pixels = imread(tmp_path / "p.png")[..., :3]
    for color in (KEPT, SAVED):
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(-1) < 0.01).sum() > 1000


def test_torch_alone_is_enough(report, monkeypatch, tmp_path):
    for path in Path(sdgp_fx.__file__).parent.glob("inspection/*.py"):
        if path.stem in ("explain", "dry_run", "report", "capture"):
            imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M)
            assert {*imported} <= {*sys.stdlib_module_names, "torch"}, path
    for name in ("rich", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "1 of 3 layers pruned" in str(report)
    assert "products of pruned layers: 0 of 1 sparse, which skip 0" in str(report)
    assert "1 of 3 layers pruned" in report._repr_html_()
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib\.figure"):
        report.plot(tmp_path / "p.png")


def test_the_examples_of_the_docs_run(monkeypatch, capsys):
    monkeypatch.setenv("SDGP_INNER", "aot_eager")
    text = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(examples) == 2
    exec("\n".join(examples), {})
    out = capsys.readouterr().out
    assert "layer4.1.conv2 pruned" in out
    assert "torch.ops.sdgp.prune_nm" in out


# The command line

SMALL = ["explain", "test_resnet", "--batch", "2", "--input-size", "32"]


def test_command_prints_the_report_and_draws_it(tmp_path, capsys):
    picture = tmp_path / "p.png"
    assert command.main([*SMALL, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "14 of 15 layers pruned, 1 dense: no input gradient" in out
    assert imread(picture).size


def test_command_prints_json_for_images_that_the_network_is_not_made_for(capsys):
    arguments = ["explain", "test_vit", "--batch", "1", "--input-size", "1x32x48", "--json"]
    assert command.main([*arguments, "--n", "1", "--m", "8", "--targets", "conv,linear"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["m"] == 8
    (patches,) = (layer for layer in report["layers"] if layer["kind"] == "conv")
    assert patches["input_shape"] == [1, 1, 32, 48]
    for layer in report["layers"]:
        count = layer["multiply_adds"]
        assert count["saved"] == (count["input_gradient"] * 7 // 8 if layer["pruned"] else 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "test_resne"], "test_resnet"),
        (["explain", "test_vit", "--input-size", "8"], "--input-size 3x160x160"),
        ([*SMALL, "--input-size", "0x32"], "192x256"),
        ([*SMALL, "--input-size", "32x"], "192x256"),
        ([*SMALL, "--batch", "0"], "--batch"),
        ([*SMALL, "--m", "6"], "sdgp.m"),
        ([*SMALL, "--targets", "convs"], "sdgp.targets"),
        ([*SMALL, "--plot", "missing/p.png"], "folder"),
        ([*SMALL, "--plot", "p.gif"], ".svg"),
    ],
)
def test_command_names_what_to_do(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_command_help_has_examples(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["explain", "--help"])
    assert exit_.value.code == 0
    assert "explain resnet50;" in capsys.readouterr().out


def test_in_a_process_that_has_compiled_nothing():
    """Inductor decomposes max pooling with what it has otherwise imported by then."""
    code = """
import torch
import sdgp_fx

model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.MaxPool2d(3, 2, 1), torch.nn.Conv2d(8, 8, 3)
)
print(*(layer.pruned for layer in sdgp_fx.explain(model, torch.randn(2, 3, 16, 16))))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "True"], run.stderr
