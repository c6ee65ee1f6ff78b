"""Test the command that sweeps over all networks."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs timm")
pytest.importorskip("torchvision", reason="needs torchvision")

from benchmarks import timm_summary, timm_sweep
from benchmarks.harness.architectures import Architecture, Example, describe, find_example
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.fixture
def small(monkeypatch):
    """Return a function that gives the row of Network, whatever architecture is examined."""
    network = Network()
    example = Example(network, (torch.randn(2, 3, 8, 8),), nullcontext, 8, fake=False)
    monkeypatch.setattr(timm_sweep, "find_example", lambda *_: example)
    return lambda: timm_sweep.examine(Architecture("timm", "small", "none"))


def test_row_of_a_network(small):
    row = small()
    assert row["layers"] == row["modules"] == {"conv": 2, "linear": 1}
    assert row["pruned"] == {"conv": 1, "linear": 1}
    assert row["dense"] == {"conv: no input gradient": 1}
    assert (row["gradients"], row["identical"], row["graphs"], row["breaks"]) == (6, 2, 1, 0)
    assert (row["error"], row["stock"], row["violations"], row["unnamed"]) == (None, None, [], [0])


def test_a_weight_gradient_of_a_pruned_gradient_is_a_violation(small, monkeypatch):
    prune_input_grads = timm_sweep.prune_input_grads

    def broken(graph, config):
        decisions = prune_input_grads(graph, config)
        for prune in graph.find_nodes(op="call_function", target=PRUNE_NM):
            for user in list(prune.args[0].users):
                if user.target is CONVOLUTION_BACKWARD:
                    user.update_arg(0, prune)
                    prune.append(user)
        return decisions

    monkeypatch.setattr(timm_sweep, "prune_input_grads", broken)
    row = small()
    (violation,) = row["violations"]
    assert "is read by" in violation
    assert row["error"] is None


def test_what_stock_does_where_the_pass_fails(small, monkeypatch):
    def fails(graph, config):
        raise RuntimeError("no\nsecond line")

    monkeypatch.setattr(timm_sweep, "prune_input_grads", fails)
    row = small()
    assert (row["error"], row["stock"]) == ("sdgp: RuntimeError: no", "compiles")


def test_what_stock_does_where_it_fails_too(small, monkeypatch):
    monkeypatch.setattr(Network, "forward", lambda self, x: torch.compile(self.head)(x.missing))
    row = small()
    assert row["error"].startswith("sdgp: ")
    assert row["stock"].startswith("stock: ")


# Examples of networks


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 32),
        ("test_vit", 32),
        ("vit_tiny_patch16_224", 32),
        ("vit_7b_patch16_dinov3", 32),
    ],
)
def test_smallest_images_that_a_network_takes(name, size):
    example = find_example(Architecture("timm", name, ""), fake=True)
    assert (example.size, example.fake) == (size, True)
    assert example.network.training


def test_a_network_that_takes_no_image_raises_what_it_raises(monkeypatch):
    monkeypatch.setattr(Architecture, "build", lambda self, size=None: nn.Linear(5, 5))
    with pytest.raises(RuntimeError, match="5"):
        find_example(Architecture("timm", "test_resnet", ""), fake=True)


def test_a_network_that_looks_at_values_gets_some(monkeypatch):
    class Looks(Network):
        def forward(self, x):
            return super().forward(x * x.mean().item())

    monkeypatch.setattr(Architecture, "build", lambda self, size=None: Looks())
    row = timm_sweep.examine(Architecture("timm", "test_resnet", ""))
    assert (row["fake"], row["error"], row["stock"]) == (False, None, None)
    assert row["breaks"] == 1
    assert row["pruned"] == {"conv": 1, "linear": 1}


def test_structures_are_equal_where_networks_are():
    def structure(name):
        return describe(Architecture("timm", name, ""))[1]

    assert structure("vit_tiny_patch16_224") == structure("vit_tiny_patch16_384")
    different = [
        "vit_tiny_patch16_224",
        "vit_tiny_r_s16_p8_224",
        "test_vit",
        "test_vit2",
        "resnet18",
    ]
    assert len(set(map(structure, different))) == len(different)


# The command


@pytest.fixture
def inline(monkeypatch):
    """Make calls in this process and compile no network; return the names of those asked for."""
    asked = []

    def run_apart(calls, jobs, limit, lifetime):
        for key, function, args in calls:
            yield key, function(*args)

    def examine(architecture):
        asked.append(architecture.full_name)
        return {"model": architecture.full_name, "error": None, "stock": None}

    monkeypatch.setattr(timm_sweep, "run_apart", run_apart)
    monkeypatch.setattr(timm_sweep, "examine", examine)
    monkeypatch.setattr(timm_sweep, "describe", lambda a: (len(a.name), a.full_name))
    return asked


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.json"


def sweep(out, *options, only="test_*et"):
    return timm_sweep.main(["--out", str(out), "--only", only, *options])


def rows(out):
    return {row["model"]: row for row in json.loads(out.read_text())["rows"]}


def test_smallest_of_each_family_first(inline, out):
    assert sweep(out) == 0
    assert inline == [
        "test_nfnet",
        "test_resnet",
        "test_byobnet",
        "test_coatnet",
        "test_efficientnet",
    ]


def test_goes_on_where_it_ended(inline, out, monkeypatch):
    assert sweep(out, only="test_resnet") == 0
    first = rows(out)
    assert sweep(out) == 0
    assert inline.count("test_resnet") == 1
    assert len(inline) == len(rows(out)) == 5
    assert rows(out)["test_resnet"] == first["test_resnet"]
    inline.clear()
    assert sweep(out) == 0
    assert inline == []
    monkeypatch.setattr(timm_sweep, "versions", lambda: "others")
    assert sweep(out) == 0
    assert inline == []
    assert sweep(out, "--redo") == 0
    assert len(inline) == 5


def test_no_time_is_left(inline, out):
    assert sweep(out, "--minutes", "1e-9") == 0
    assert inline == []
    assert sweep(out, only="test_resnet") == 0
    assert sweep(out, "--minutes", "1e-9", only="test_resnet") == 0
    assert inline == ["test_resnet"]


def test_networks_of_one_structure_are_examined_once(inline, out, monkeypatch, capsys):
    monkeypatch.setattr(timm_sweep, "describe", lambda a: (0, "same"))
    assert sweep(out) == 0
    assert inline == ["test_byobnet"]
    assert sweep(out) == 0
    assert inline == list(rows(out)) == ["test_byobnet"]
    assert "5 of 5 networks compile, of 5" in capsys.readouterr().out


def test_a_network_that_dies(inline, out, monkeypatch, capsys):
    def run_apart(calls, jobs, limit, lifetime):
        for key, function, args in calls:
            dies = function is timm_sweep.examine and key.name == "test_resnet"
            yield key, ChildProcessError("died with exit code -11") if dies else function(*args)

    monkeypatch.setattr(timm_sweep, "run_apart", run_apart)
    monkeypatch.setattr(timm_sweep, "examine_stock", lambda a: "compiles")
    assert sweep(out) == 0
    row = rows(out)["test_resnet"]
    assert row["error"] == "process: ChildProcessError: died with exit code -11"
    assert row["stock"] == "compiles"
    assert len(rows(out)) == 5
    shown = capsys.readouterr().out
    assert "test_resnet: process: ChildProcessError" in shown
    assert "4 of 5 networks compile" in shown


def test_an_interrupt_leaves_what_there_was(inline, out, monkeypatch, capsys):
    examine = timm_sweep.examine

    def interrupted(architecture):
        if architecture.name == "test_byobnet":
            raise KeyboardInterrupt
        return examine(architecture)

    monkeypatch.setattr(timm_sweep, "examine", interrupted)
    assert sweep(out) == 130
    assert list(rows(out)) == ["test_nfnet", "test_resnet"]
    assert "2 of 2 networks compile, of 5" in capsys.readouterr().out


@pytest.mark.slow
def test_in_processes_of_their_own(out, capfd):
    assert sweep(out, "--jobs", "1", only="test_resnet") == 0
    (row,) = rows(out).values()
    assert (row["model"], row["error"]) == ("test_resnet", None)
    assert row["pruned"] == {"conv": 14, "linear": 1}
    assert row["parameters"] == 469688
    captured = capfd.readouterr()
    assert captured.out == "1 of 1 networks compile, of 1\n"
    assert "1/1 test_resnet" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "none"], "--only: expected a glob that fits a network"),
        (["--jobs", "0"], "--jobs"),
        (["--out", "/nowhere/x"], "--out: expected a file in a folder that exists"),
        (["--out", "{out.parent}/other.json"], "expected results of timm_sweep"),
    ],
)
def test_errors_are_of_one_line(capsys, out, options, message):
    out.with_name("other.json").write_text('{"rows": []}')
    with pytest.raises(SystemExit) as error:
        sweep(out, *(option.format(out=out) for option in options))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_summary(out, capsys):
    """A network with the structure of an examined one counts like it; any other does not."""
    row = {
        "model": "a",
        "error": None,
        "stock": None,
        "fake": True,
        "layers": {"conv": 5, "linear": 1},
        "pruned": {"conv": 3, "linear": 1},
        "dense": {"conv: no input gradient": 2},
        "modules": {"conv": 4, "linear": 1},
        "graphs": 1,
        "breaks": 0,
        "gradients": 12,
        "identical": 2,
        "violations": [],
        "with": "torch 2",
    }
    failed = {"model": "c", "error": "sdgp: RuntimeError: a | b", "stock": "compiles"}
    networks = {
        "a": ("family", 1, "x"),
        "b": ("family", 1, "x"),
        "c": ("family", 1, "y"),
        "torchvision/d": ("family", 1, "z"),
    }
    timm_sweep.Results(out, networks, {"a": row, "c": failed | {"with": "torch 2"}}).save()
    assert timm_summary.main([str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("4 networks, 3 of them examined, by 2 of different structure")
    assert "- 2 compile, 0 of these with graph breaks; 1 fail, of which stock" in lines[4]
    assert lines[4].endswith("compiles 1.")
    assert "- Of 24 gradients 4 have no pruned layer downstream" in lines[6]
    assert "- 10 convolutions found of 8 modules with a gradient, 6 pruned" in lines[7]
    assert "| c | sdgp: RuntimeError: a \\| b | compiles |" in lines
    assert "| family | 3 | 3 | 2 | 10 + 2 | 6 + 2 | 4 + 0 | 0 + 0 | 0 + 0 |" in lines
    assert "| torchvision/family | 1 | 0 | 0 | 0 + 0 | 0 + 0 | 0 + 0 | 0 + 0 | 0 + 0 |" in lines


def test_summary_of_no_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        timm_summary.main([str(tmp_path / "none.json")])
    assert "expected results of timm_sweep" in capsys.readouterr().err
