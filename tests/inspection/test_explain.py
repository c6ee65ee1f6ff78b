"""Test the report of explain: what it counts, what it leaves alone, and how it is shown."""

import dataclasses
import html
import json
import random
import re
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import sdgp_fx
from sdgp_fx import Explanation, explain
from sdgp_fx.cli import main as command
from sdgp_fx.inspection.explain import NO_GRADIENT, NOT_COMPILED, NOT_RUN
from sdgp_fx.inspection.report import KEPT, SAVED
from sdgp_fx.measurement.networks import Uninitialized

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
        assert last.reason == NOT_RUN
        assert any("could not be followed" in warning for warning in rows.warnings)
    assert json.loads(json.dumps(rows.to_dict()))["layers"][0]["module"] == "first"
    assert "?" in str(rows) or not is_captured


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
        *("2.048 k", "2.048 k", "2.048 k", "1.024 k", "pruned"),
    ]
    assert len(header) == len(rows[1])
    assert "1 of 3 layers pruned" in str(report)


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
