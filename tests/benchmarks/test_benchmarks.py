"""The benchmarks: what they run, save, show and refuse. Never how fast anything is."""

import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")
from rich.console import Console

from benchmarks import (
    ceilings,
    convolutions,
    correctness,
    gpu_suite,
    layers,
    prune_op,
    report,
    sparse_mm,
    terminal,
    train_step,
    whole_channels,
)
from benchmarks.benchmark import Benchmark, Task
from benchmarks.command import MEMORY_FORMATS
from benchmarks.gpu_suite import DONE, FAILED, NEEDS_CUDA, NO_TIME, Part
from sdgp_fx.kernels.channels import select_channels
from sdgp_fx.measurement import timing
from sdgp_fx.measurement.convolutions import calls_of_convolutions

from ..conftest import HAS_GPU

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODULES = {
    module.BENCHMARK.name: module
    for module in (ceilings, convolutions, prune_op, sparse_mm, train_step, whole_channels)
}
TINY = ["--model", "test_resnet", "--size", "32", "--batch", "2"]
SHORT = ["--device", "cpu", "--seconds", "0.001"]
COMMANDS = {
    "ceilings": ["--copy-mib", "1", "--matmul", "32"],
    "convolutions": [*TINY],
    "prune_op": [*TINY, "--m", "4", "--m", "8"],
    "train_step": [*TINY, "--inner", "aot_eager", "--n", "1"],
    "whole_channels": [*TINY, "--inner", "aot_eager", "--pattern", "2:4"],
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Tensors this small gain nothing from more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Commands


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert MODULES[name].main([*COMMANDS[name], *SHORT, "--out", str(out)]) == 0

    saved = json.loads(out.read_text())
    assert list(saved) == ["benchmark", "environment", "settings", "rows"]
    assert saved["benchmark"] == name
    assert saved["settings"]["seconds"] == 0.001
    assert saved["environment"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [out]

    printed = capsys.readouterr().out
    lines = printed.splitlines()
    columns = MODULES[name].BENCHMARK.columns
    assert all(header in lines[0] for header in columns)
    assert all(
        row[key] is None or "times" in row for row in saved["rows"] for key, _ in columns.values()
    )
    assert lines[1 + len(saved["rows"]) : -1] == MODULES[name].BENCHMARK.headline(saved["rows"])
    environment = saved["environment"]
    for known in ("device", "torch", "triton", "date", "commit"):
        assert str(environment[known] or "unknown") in lines[-1]


@pytest.mark.parametrize("name", [*MODULES, "gpu_suite"])
def test_help(name, capsys):
    module = MODULES.get(name, gpu_suite)
    with pytest.raises(SystemExit) as exit_:
        module.main(["--help"])
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"usage: python -m benchmarks.{name}" in printed
    assert f"example: python -m benchmarks.{name} --" in printed


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("ceilings", ["--matmul", "0"], "--matmul: expected a number above 0, got '0'"),
        ("ceilings", ["--seconds", "soon"], "--seconds: expected a number above 0, got 'soon'"),
        ("ceilings", ["--out", "/no/such/folder/x.json"], "--out: expected a file in a folder"),
        ("ceilings", ["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        ("ceilings", ["--very\ndeep"], "unrecognized arguments: --very deep"),
        ("prune_op", ["--model", "resnt18"], "--model: expected a network of timm, got 'resnt18'"),
        ("prune_op", ["--m", "5"], "--m: invalid choice: 5"),
        ("prune_op", ["--model", "test_vit", "--size", "8"], "--size: test_vit takes no 8x8"),
        ("convolutions", ["--model", "resnt18"], "--model: expected a network of timm"),
        ("train_step", ["--model", "resnt18"], "--model: expected a network of timm"),
        ("train_step", ["--n", "5"], "sdgp.n: expected 1 <= n <= sdgp.m = 4, got 5"),
        ("train_step", ["--also", "5:4"], "sdgp.n: expected 1 <= n <= sdgp.m = 4, got 5"),
        ("train_step", ["--also", "5"], "argument --also: expected n:m, such as 2:4, got '5'"),
        (
            "train_step",
            ["--mode", "max-autotune", "--inner", "aot_eager"],
            "--mode: expected default with --inner aot_eager, got max-autotune",
        ),
        ("whole_channels", ["--model", "resnt18"], "--model: expected a network of timm"),
        ("whole_channels", ["--pattern", "8:4"], "sdgp.n: expected 1 <= n <= sdgp.m = 4, got 8"),
        ("sparse_mm", [], "--device: expected cuda, which cuSPARSELt needs, got cpu"),
        ("gpu_suite", ["--out", "results"], "--device: expected cuda, got cpu, which is for"),
        ("gpu_suite", [], "the following arguments are required: --out"),
        ("gpu_suite", ["--out", "pyproject.toml", "--quick"], "File exists: 'pyproject.toml'"),
        ("gpu_suite", ["--out", "results", "--minutes", "-1"], "--minutes: expected a number"),
    ],
)
def test_usage_errors_are_one_line(name, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        MODULES.get(name, gpu_suite).main(["--device", "cpu", *arguments])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert err.startswith(f"python -m benchmarks.{name}: error: ")
    assert said in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
def test_cuda_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        ceilings.main(["--device", "cuda"])
    assert "--device: expected auto or cpu where torch finds no GPU" in capsys.readouterr().err


def test_options_given_several_times_replace_the_default(monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    for sizes in ([32], [16, 32]):
        options = [f"--matmul={size}" for size in sizes]
        assert ceilings.main([*options, *SHORT, "--copy-mib", "1", "--out", str(out)]) == 0
        assert json.loads(out.read_text())["settings"]["sizes"] == sizes


def test_an_interrupt_ends_a_command_and_keeps_its_rows(tmp_path):
    """The whole command, as a user sees it."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.ceilings", "--copy-mib", "1", "--matmul", "2048"]
    command += ["--device", "cpu", "--seconds", "60", "--dtype", "float32", "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr.readline() == "1/2 copy\n"
    assert process.stderr.readline() == "2/2 matmul 2048\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == ""
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ceiling"] == "copy 1 MiB"
    assert printed.splitlines()[1].startswith("copy 1 MiB")


# Timing


class Clock:
    """Stands still but when functions take their time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.log = []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def function(self, name, *seconds):
        """Takes seconds in turn."""
        durations = itertools.cycle(seconds)

        def run():
            self.log.append(name)
            self.now += next(durations)

        return run


def test_functions_are_timed_in_turn(monkeypatch):
    clock = Clock(monkeypatch)
    functions = {"a": clock.function("a", 1), "b": clock.function("b", 2)}
    times = timing.measure(functions, CPU, seconds=30)
    assert clock.log == ["a", "b"] * (2 + 10)  # Two rounds of warm-up, then 30 seconds.
    assert times == {"a": timing.Timing(1, 1, 1, 10), "b": timing.Timing(2, 2, 2, 10)}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 5), (7, 7), (1e6, 1000)])
def test_the_budget_is_kept_between_least_and_most(monkeypatch, seconds, rounds):
    clock = Clock(monkeypatch)
    times = timing.measure({"a": clock.function("a", 1)}, CPU, seconds)
    assert times["a"].samples == rounds
    assert len(clock.log) == 2 + rounds


def test_median_and_quartiles_of_a_call(monkeypatch):
    clock = Clock(monkeypatch)
    functions = {"a": clock.function("a", 2, 1, 50, 3, 5, 4, 1)}  # The first two are warm-up.
    assert timing.measure(functions, CPU, 5, calls=2)["a"] == timing.Timing(2, 1.5, 2.5, 5)


def test_enough_tensors_to_find_none_in_the_cache():
    assert len(timing.cold(list, 2**20, CUDA)) == 256
    assert len(timing.cold(list, 300 * 2**20, CUDA)) == 1
    results = timing.cold(list, 200 * 2**20, CUDA)
    assert len(results) == 2
    assert results[0] is not results[1]
    assert len(timing.cold(list, 1, CPU)) == 1


def test_back_to_back_makes_all_calls():
    made = []
    run = timing.back_to_back([partial(made.append, i) for i in range(3)], CPU)
    assert made == []
    run()
    assert made == [0, 1, 2]


@pytest.mark.gpu
def test_back_to_back_and_memory_on_the_gpu():
    xs = [torch.full((1000,), float(i), device="cuda") for i in range(3)]
    outs = [torch.empty_like(x) for x in xs]
    run = timing.back_to_back(
        [partial(torch.neg, x, out=out) for x, out in zip(xs, outs, strict=True)], CUDA
    )
    for out in outs:
        out.zero_()
    run()
    torch.cuda.synchronize()
    assert [out[0].item() for out in outs] == [0, -1, -2]
    assert timing.measure({"run": run}, CUDA, 0.01, calls=3)["run"].median > 0
    assert timing.peak_memory(lambda: torch.empty(2**20, device="cuda").fill_(1), CUDA) >= 2**22


def test_memory_on_the_cpu_is_what_is_held_at_once():
    size = 2**22

    def allocate():
        first = torch.ones(size, dtype=torch.uint8)
        second = first + 1
        del first
        return second + 1

    before = torch.ones(size, dtype=torch.uint8)
    assert 2 * size <= timing.peak_memory(allocate, CPU) < 2.5 * size
    assert timing.peak_memory(lambda: before.add_(1), CPU) < size


# Reports


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    report.write_text(path, "[1]")
    write = Path.write_text

    def interrupted(self, text):
        write(self, text[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_text(path, "[2]")
    assert json.loads(path.read_text()) == [1]


def test_every_addition_is_saved(tmp_path):
    path = tmp_path / "out.json"
    saved = report.Report("name", {}, {}, path)
    for count in (1, 2):
        saved.add([{"a": count}])
        assert len(json.loads(path.read_text())["rows"]) == count


def test_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    git("tag", "-a", "v1", "-m", "a")
    head = git("rev-parse", "HEAD").stdout[:12]
    assert report.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert report.commit(tmp_path) == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert report.commit(tmp_path) is None


def test_caption_leaves_out_what_is_not_there():
    line = report.caption("name", {**report.environment(CPU), "commit": None})
    assert "cudnn" not in line
    assert "None" not in line
    assert "commit unknown" in line


# What is shown


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(terminal, "find_console", lambda: console)
    return console


def test_progress_and_table_on_a_terminal(console):
    with terminal.progress(3, estimate=True) as begin:
        begin("[first]")
        begin("second")
    terminal.print_table(["name", "value"], [["a", "1.5"]])
    shown = console.file.getvalue()
    assert "3/3" in shown
    assert "left" in shown
    assert "│ a    │   1.5 │" in shown


def test_progress_and_table_in_a_file(capsys):
    with terminal.progress(2) as begin:
        begin("first")
        begin("second")
    terminal.print_table(["name", "value"], [["a", "1.5"], ["long name", "10.25"]])
    out, err = capsys.readouterr()
    assert err == "1/2 first\n2/2 second\n"
    assert out == "name       value\na            1.5\nlong name  10.25\n"


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(terminal.find_console(), Console)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert terminal.find_console() is None


def test_a_command_runs_where_rich_is_missing():
    code = """
import sys
sys.modules["rich"] = None
import benchmarks.ceilings
sys.exit(benchmarks.ceilings.main("--device cpu --copy-mib 1 --matmul 8 --seconds 0.01".split()))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "copy 1 MiB" in run.stdout


# Layers


def test_convolutions_of_resnet18():
    found = layers.find_convolutions("resnet18", 256, 224)
    assert len(found) == 11
    assert sum(found.values()) == 20
    first, second, *_ = found.items()
    assert first[0].weight == (64, 3, 7, 7)
    assert first[1] == 1
    assert not first[0].needs_input_gradient
    assert second[0].input == second[0].output == (256, 64, 56, 56)
    assert second[1] == 4
    assert all(convolution.needs_input_gradient for convolution in list(found)[1:])
    # 1.8 billion multiplications and additions for an image (He et al. 2016).
    flops = sum(convolution.flops * count for convolution, count in found.items())
    assert flops / 2 / 256 == pytest.approx(1.81e9, rel=0.01)


def test_flops_of_a_transposed_convolution():
    """Each input value is multiplied by all weights of its channel."""
    network = torch.nn.ConvTranspose2d(8, 16, 2, stride=2, groups=4, bias=False)
    ((_, convolution),) = calls_of_convolutions(network, torch.randn(3, 8, 5, 5))
    assert convolution.transposed
    assert convolution.flops == 2 * (3 * 8 * 5 * 5) * (16 // 4 * 2 * 2)


def test_shapes_that_get_pruned():
    images = {"batch": 256, "size": 224}
    expected = [(256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 7, 7)]
    assert prune_op.gradient_shapes(["resnet18"], **images) == expected
    both = prune_op.gradient_shapes(["resnet18", "resnet50"], **images)
    assert len(both) == len(set(both)) == 11
    assert both[:4] == expected
    assert (256, 2048, 7, 7) in both
    assert (256, 64, 112, 112) not in both  # The first layer has no input gradient.
    depthwise = layers.find_convolutions("convnext_tiny", 2, 224)
    assert any(convolution.groups > 1 for convolution in depthwise)
    pruned = prune_op.gradient_shapes(["convnext_tiny"], 2, 224)
    assert pruned == [(2, 192, 28, 28), (2, 384, 14, 14), (2, 768, 7, 7)]


def plan_prune(**settings):
    defaults = {"models": ["resnet18"], "batch": 2, "size": 224, "dtype": "bfloat16"}
    defaults |= {"functions": prune_op.PRUNING_FUNCTIONS, "ms": prune_op.M, "everything": False}
    tasks = prune_op.plan(CPU, **{**defaults, "seconds": 0.001, **settings})
    return [(task.name, len(task.run.args[5])) for task in tasks]


def test_prune_op_tries_everything_on_one_shape():
    planned = plan_prune()
    assert [variants for _, variants in planned[:8]] == [1, 1, 6, 6, 1, 1, 1, 1]
    assert {name.split()[-1] for name, _ in planned[:8]} == {"2:4"}
    # The shape of median size, in both formats, at the other m.
    assert [name.split()[0] for name, _ in planned[8:]] == [planned[2][0].split()[0]] * 8
    assert {name.split()[-1] for name, _ in planned[8:]} == {"1:2", "4:8", "8:16", "16:32"}
    assert {name.split()[1] for name, _ in planned} == set(MEMORY_FORMATS)


def test_prune_op_can_try_all_or_less():
    assert plan_prune(everything=True, ms=[8]) == [
        (name, 6) for name, _ in plan_prune(everything=True, ms=[8])
    ]
    assert len(plan_prune(everything=True)) == 5 * 4 * 2
    assert [variants for _, variants in plan_prune(functions=["mvue"], ms=[4])] == [1, 1]


def test_prune_op_times_the_operator_and_a_copy(monkeypatch):
    """Of the same values, in the same strides, at the same settings."""
    seen = {}

    def measure(functions, device, seconds, calls):
        for function in functions.values():
            function()
        seen["names"] = list(functions)
        return {
            name: timing.Timing(2e-3 if i else 1e-3, 0, 0, 1) for i, name in enumerate(functions)
        }

    def operator(x, seed, *settings):
        seen[settings] = x.stride()
        return x

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(prune_op, "prune_nm", operator)
    shape = (2, 8, 5, 5)
    variants = [("mvue", "group"), ("rescaled_magnitude", "channel")]
    rows = prune_op.measure(CPU, shape, "float16", "channels_last", 8, variants, 0.1)
    strides = torch.empty(shape).contiguous(memory_format=torch.channels_last).stride()
    assert seen[4, 8, "mvue", "group", 1] == strides
    assert seen[4, 8, "rescaled_magnitude", "channel", 1] == strides
    assert len(seen["names"]) == 3
    for row in rows:
        assert row["share_of_copy"] == 0.5
        assert row["prune_gb_per_s"] == pytest.approx(2 * 400 * 2 / 2e-3 / 1e9)
        assert row["copy_gb_per_s"] == pytest.approx(2 * 400 * 2 / 1e-3 / 1e9)
    assert [row["rescale"] for row in rows] == [None, "channel"]


def test_convolutions_sum_up_by_count():
    def row(count, forward, input_gradient, weight_gradient):
        times = {"forward_us": forward, "input_gradient_us": input_gradient}
        return {"model": "m", "count": count, **times, "weight_gradient_us": weight_gradient}

    (line,) = convolutions.headline([row(1, 1000, None, 1000), row(2, 1000, 2000, 1000)])
    assert line == (
        "m convolutions 10.00 ms: forward 30.0%, input gradient 40.0%, weight gradient 30.0%"
    )


def test_convolutions_compute_the_gradients(monkeypatch):
    """What is timed under each name, on a layer with stride, padding and groups."""
    results = {}

    def measure(functions, device, seconds, calls):
        return {name: timing.Timing(1e-6, 0, 0, 1) for name in functions}

    def back_to_back(calls, device):
        results[len(results)] = (calls[0].args, calls[0]())

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "back_to_back", back_to_back)
    network = torch.nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    ((_, convolution),) = calls_of_convolutions(network, x)
    settings = ("float32", "channels_last", False, 0.1)
    first = dataclasses.replace(convolution, needs_input_gradient=False)
    (row,) = convolutions.measure(CPU, "m", first, 1, *settings)
    assert row["input_gradient_us"] is row["input_gradient_tflops"] is None
    assert len(results) == 2
    results.clear()
    (row,) = convolutions.measure(CPU, "m", convolution, 1, *settings)
    assert row["forward_tflops"] == pytest.approx(convolution.flops / 1e-6 / 1e12)

    forward, weight_gradient, input_gradient = results.values()
    x, weight = (tensor.requires_grad_() for tensor in forward[0][:2])
    expected = torch.nn.functional.conv2d(x, weight, stride=2, padding=1, groups=2)
    torch.testing.assert_close(forward[1], expected)
    grad_output = weight_gradient[0][0]
    gx, gw = torch.autograd.grad(expected, (x, weight), grad_output)
    assert [g is None for g in weight_gradient[1]] == [True, False, True]
    assert [g is None for g in input_gradient[1]] == [False, True, True]
    torch.testing.assert_close(weight_gradient[1][1], gw)
    torch.testing.assert_close(input_gradient[1][0], gx)


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_channels_computes_what_it_names(transposed, monkeypatch):
    """On a layer with stride, padding and groups: dense, pruned, and the smaller product."""
    made = []

    def sample(functions, device, seconds):
        made.extend((name, *function()) for name, function in functions.items())
        return {name: [1e-3, 2e-3, 3e-3] for name in functions}

    def back_to_back(calls, device):
        return lambda: (calls[0].args, calls[0]())

    monkeypatch.setattr(timing, "sample", sample)
    monkeypatch.setattr(timing, "back_to_back", back_to_back)
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    network = kind(8, 16, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    ((_, convolution),) = calls_of_convolutions(network, x)
    settings = ("float32", "channels_last", [(2, 4), (1, 8)], "magnitude", "aot_eager", False, 0.1)
    rows = whole_channels.measure(CPU, "m", convolution, 3, *settings)

    names = ["dense", ("whole", 2, 4), ("product", 2, 4), ("whole", 1, 8), ("product", 1, 8)]
    assert [name for name, *_ in made] == names
    for name, (grad_output, x, weight), gradient in made:
        prune, n, m = (None, 1, 1) if name == "dense" else name
        if prune == "whole":
            norms = grad_output.abs().sum((0, 2, 3))
            index, _ = select_channels(norms, n, m, "magnitude")
            dropped = torch.ones(16, dtype=torch.bool).index_fill(0, index, False)
            grad_output = grad_output.masked_fill(dropped.view(-1, 1, 1), 0)
        elif prune == "product":
            assert grad_output.shape[1] == 16 * n // m
        operands = grad_output, x, weight, None, *convolution.settings, [True, False, False]
        expected = torch.ops.aten.convolution_backward(*operands)[0]
        torch.testing.assert_close(gradient, expected)
    assert [(row["n"], row["m"], row["count"], row["chosen"]) for row in rows] == [
        (2, 4, 3, False),
        (1, 8, 3, False),
    ]
    assert [row["ratio"] for row in rows] == [1, 1]


def test_whole_channels_tells_which_layers_the_rule_chooses(monkeypatch):
    monkeypatch.setattr(timing, "back_to_back", lambda calls, device: None)
    monkeypatch.setattr(timing, "sample", lambda functions, *_: dict.fromkeys(functions, [1.0] * 2))
    found = layers.find_convolutions("resnet18", 16, 128)
    settings = ("float32", "channels_last", [(2, 4)], "magnitude", "aot_eager", False, 0.1)
    chosen = {
        row["convolution"]: row["chosen"]
        for convolution, count in found.items()
        if whole_channels.is_pruned(convolution, 4)
        for row in whole_channels.measure(CPU, "resnet18", convolution, count, *settings)
    }
    assert chosen["16x256x8x8 * 256x256x3x3"]
    assert not chosen["16x64x32x32 * 128x64x1x1 / 2x2"]


def test_whole_channels_sum_up_by_count_and_choice():
    def row(count, dense, whole, product, chosen):
        times = {"dense_us": dense, "whole_us": whole, "product_us": product}
        return {"model": "m", "n": 2, "m": 4, "count": count, "chosen": chosen, **times}

    rows = [row(1, 1000, 2000, 500, False), row(3, 3000, 2000, 1000, True)]
    assert whole_channels.headline([*rows, row(2, 1000, 500, 500, False)]) == [
        "input gradients of m 2:4: dense 12.00 ms; all pruned 0.750, as the rule chooses 0.750, "
        "at best 0.667, products alone 0.375 of it"
    ]


# Training steps


def compiler(**settings):
    pruning = {"n": 2, "m": 4, "prune": "magnitude", "rescale": "group"}
    return train_step.Compiler(
        **{"mode": "default", "pruning": pruning, "inner": "aot_eager", **settings}
    )


def test_both_start_alike_and_one_is_pruned():
    images, labels = train_step.random_batch(CPU, 4, 8)
    losses = {}
    for name in (train_step.STOCK, train_step.SDGP):
        torch.manual_seed(0)
        layers_ = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)]
        model = torch.nn.Sequential(*layers_, torch.nn.Flatten(), torch.nn.Linear(128, 1000))
        step = train_step.make_step(name, model, images, labels, torch.float32, compiler())
        with compiler().environment():
            losses[name] = [step().item() for _ in range(3)]
    stock, sdgp = losses.values()
    assert stock[0] == sdgp[0]
    assert stock[2] < stock[0]
    assert sdgp[2] < sdgp[0]
    assert stock[2] != sdgp[2]


def test_every_compilation_starts_with_empty_caches(monkeypatch):
    """They alternate, and the settings go through the environment, which a mode allows."""
    steps = []

    def make_step(name, model, *_):
        def step():
            steps.append((name, id(model), dict(os.environ)))
            return torch.tensor(1.0 if name == "stock" else 1.5)

        return step

    monkeypatch.setattr(train_step, "make_step", make_step)
    chosen = compiler(mode="max-autotune", pruning={"n": 1, "prune": "mvue"})
    arguments = (CPU, "test_resnet", 2, 32, "float32", "channels_last", chosen, 3, False, 1e-9)
    (row,) = train_step.measure(*arguments)
    compiled, timed = steps[:6], steps[6:]
    assert [name for name, *_ in compiled] == ["stock", "sdgp"] * 3
    assert len({environ["TORCHINDUCTOR_CACHE_DIR"] for *_, environ in compiled}) == 6
    for *_, environ in compiled:
        assert (environ["SDGP_N"], environ["SDGP_PRUNE"]) == ("1", "mvue")
    assert [name for name, *_ in timed] == ["stock", "sdgp"] * 7
    assert {model for _, model, _ in timed} == {model for _, model, _ in compiled[4:]}
    assert "SDGP_N" not in timed[0][2]
    assert [len(times) for times in row["compile_s"].values()] == [3, 3]
    assert row["loss_difference"] == 0.5


def test_patterns_are_compiled_and_timed_in_turn(monkeypatch):
    """Each with its own code: Dynamo would use that of an equal backend again."""
    backends = []
    compile_ = torch.compile

    def spy(model, backend, **kwargs):
        backends.append(backend)
        return compile_(model, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    arguments = (CPU, "test_resnet", 2, 32, "float32", "channels_last", compiler(), 1, False, 1e-9)
    rows = train_step.measure(*arguments, also=[(1, 4), (2, 16)])
    assert [(row["n"], row["m"]) for row in rows] == [(2, 4), (1, 4), (2, 16)]
    assert len({id(backend) for backend in backends}) == 4
    assert all(a != b for a, b in itertools.combinations(backends, 2))
    assert len({row["stock_ms"] for row in rows}) == 1
    assert len({row["sdgp_ms"] for row in rows}) == 3


def test_ratios_are_those_of_a_round(monkeypatch):
    """The machine gets slower in every round, and the medians' ratio is 4 / 3."""
    columns = {"stock": [1, 2, 3, 4, 5], "sdgp": [2, 4, 3, 4, 5]}
    monkeypatch.setattr(timing, "sample", lambda *_: columns)
    monkeypatch.setattr(timing, "peak_memory", lambda *_: 0)
    monkeypatch.setattr(train_step, "make_step", lambda *_: lambda: torch.tensor(1.0))
    arguments = (CPU, "test_resnet", 2, 32, "float32", "channels_last", compiler(), 1, False, 1e-9)
    (row,) = train_step.measure(*arguments)
    assert [row[key] for key in ("ratio_low", "ratio", "ratio_high")] == [1, 1, 2]


# Sparse products


def test_input_gradients_as_products():
    products = sparse_mm.input_gradients("resnet50", 256, 224)
    assert (256 * 56 * 56, 256, 64) in products
    assert (256 * 7 * 7, 2048, 1024) in products
    assert (256 * 7 * 7, 1024, 2048) not in products


@pytest.mark.gpu
def test_sparse_product_is_right(monkeypatch):
    (row,) = sparse_mm.measure(CUDA, (512, 256, 128), "bfloat16", 0.01)
    assert row["relative_error"] < 1e-2


# Correctness


def kernel_case(**changes):
    case = correctness.Case("magnitude", "group", 4, "float32", "channels_last", (3, 12, 5, 7))
    return case._replace(**changes)


def test_all_kernels_are_checked():
    tasks = correctness.plan_kernels(CPU, (4, 2, 8, 16, 32), 0)
    assert len({task.name for task in tasks}) == len(tasks) == 5 * 2 * 6 * 3 * 2
    assert tasks[0].run() == [{**tasks[0].run.args[1]._asdict(), "failure": None}]


def test_kernels_are_checked_in_several_processes(monkeypatch):
    monkeypatch.setattr(correctness, "reference", None)  # In this process nothing can be checked.
    alone = correctness.plan_kernels(CPU, (4,), 0)
    shared = correctness.plan_kernels(CPU, (4,), 2)
    assert [task.name for task in shared] == [task.name for task in alone]
    (row,) = shared[-1].run()
    assert row == {**alone[-1].run.args[1]._asdict(), "failure": None}


def test_gradients_to_check_have_special_values():
    for dtype, memory_format in itertools.product(("float32", "float16"), MEMORY_FORMATS):
        x = correctness.gradient(kernel_case(dtype=dtype, memory_format=memory_format))
        assert x.is_contiguous(memory_format=MEMORY_FORMATS[memory_format])
        assert x.isnan().any()
        assert x.isinf().any()
        assert (x[0] == 0).any()
        assert len(x[0].unique()) < 40


@pytest.mark.parametrize(
    ("prune", "dtype", "change", "said"),
    [
        ("magnitude", "float32", lambda x: x, None),
        ("magnitude", "float32", lambda x: x.contiguous(), "has strides"),
        ("magnitude", "float32", lambda x: torch.where(x == x[1, 0, 0, 0], 0, x), "keeps other"),
        ("magnitude", "float32", lambda x: x * (1 + 2**-23), "has other values"),
        ("random", "bfloat16", lambda x: -x, "has other values"),
        ("mvue", "float32", lambda x: x * (1 + 2**-23), None),
        ("mvue", "float32", lambda x: x * (1 + 2**-17), "has other values"),
        ("rescaled_magnitude", "bfloat16", lambda x: x * (1 + 2**-5), "has other values"),
        ("rescaled_magnitude", "float32", lambda x: torch.nan_to_num(x, 1.0), "has other values"),
    ],
)
def test_differences_are_found(prune, dtype, change, said):
    case = kernel_case(prune=prune, dtype=dtype)
    x = correctness.gradient(case)
    difference = correctness.difference(case, change(x.clone()), x)
    assert difference is None if said is None else difference.startswith(said)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"aot_eager": 2, "inductor": 2}, None),
        ({"aot_eager": 2, "inductor": 2.01}, "gradients differ by"),
        ({"aot_eager": 1, "inductor": 1}, "from those of dense training"),
    ],
)
def test_a_wrong_network_is_found(monkeypatch, factors, said):
    def compile_(network, backend, options):
        return lambda x: factors[options["sdgp.inner"]] * network(x)

    monkeypatch.setattr(torch, "compile", compile_)
    (row,) = correctness.check_network(CPU, "magnitude", "group", "channels_last")
    assert (row["failure"] is None) if said is None else (said in row["failure"])


# The suite


def nothing(rows):
    return [f"{len(rows)} rows"]


def part(name, plan, share=1.0, **kwargs):
    return Part(name, Benchmark(name, plan, {}, nothing), {}, share, **kwargs)


def plan_wrong_kernel(device):
    """In the suite's process, hence as a plan: one value too many is kept."""

    def wrong(x, seed, n, *settings):
        return correct(x, seed, n + 1, *settings)

    correct, correctness.prune_nm = correctness.prune_nm, wrong
    case = kernel_case()
    return [Task("wrong", partial(correctness.check_kernel, device, case))]


def plan_rows(device):
    return [Task("row", lambda: [{"a": 1}])]


def plan_errors(device):
    return [Task("bad", lambda: [{}[0]]), *plan_rows(device)]


def plan_death(device):
    return [*plan_rows(device), Task("death", lambda: os._exit(7))]


def plan_sleep(device):
    return [*plan_rows(device), Task("sleep", partial(time.sleep, 600))]


def run_suite(parts, out, seconds=100.0, note=""):
    code = gpu_suite.run_suite(parts, CPU, out, seconds, note)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["benchmark"] == "gpu_suite"
    return code, {row["part"]: row for row in summary["rows"]}


def test_a_wrong_kernel_stops_the_suite(tmp_path, capsys):
    parts = [
        part("kernels", plan_wrong_kernel, check=True),
        part("never", plan_rows),
        part("network", plan_rows, check=True, needs_cuda=True),
    ]
    code, outcomes = run_suite(parts, tmp_path)
    assert code == 1
    assert list(outcomes) == ["kernels"]
    assert outcomes["kernels"]["status"] == FAILED
    (error,) = outcomes["kernels"]["errors"]
    assert "magnitude group 4 float32 channels_last" in error
    assert "keeps other values in" in error
    assert f"kernels: {error}" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert "keeps other values" in row["failure"]


def test_nothing_a_part_does_stops_the_suite(tmp_path, capsys):
    (tmp_path / "death.json").write_text("of an earlier run")
    parts = [
        part("death", plan_death),
        part("sleep", plan_sleep, share=0.13),
        part("errors", plan_errors),
        part("late", plan_rows, least=99),
    ]
    begin = time.monotonic()
    code, outcomes = run_suite(parts, tmp_path)
    assert code == 0
    assert time.monotonic() - begin < 90
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "death": FAILED,
        "sleep": NO_TIME,
        "errors": FAILED,
        "late": NO_TIME,
    }
    assert outcomes["death"]["errors"] == ["the process ended with exit code 7"]
    assert outcomes["errors"]["errors"] == ["bad: KeyError: 0"]
    for name in ("death", "sleep", "errors"):
        assert (outcomes[name]["rows"], outcomes[name]["tasks"]) == (1, 2)
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"] == [{"a": 1}]
    assert "errors: bad: KeyError: 0" in capsys.readouterr().out


def test_a_worker_that_has_ended_is_a_failed_part():
    worker = gpu_suite.Worker()
    worker.process.kill()
    worker.process.join()
    try:
        arguments = (part("x", plan_rows), CPU, report.Report("x", {}, {}), time.monotonic() + 60)
        status, _, errors = worker.run(*arguments)
    finally:
        worker.end()
    assert status == FAILED
    assert errors == ["the process ended with exit code -9"]


class Here:
    """A worker in this process."""

    def __init__(self):
        self.ended = False

    def run(self, part, device, report, deadline):
        errors = []
        for kind, value in gpu_suite.messages(part, device):
            if kind == "rows":
                report.add(value)
            elif kind == "error":
                errors.append(value)
        return DONE, 1, errors

    def end(self, patience=0):
        self.ended = True


def test_an_interrupt_ends_the_suite_with_a_summary(tmp_path, capsys, monkeypatch):
    def plan_interrupt(device):
        raise KeyboardInterrupt

    workers = []
    monkeypatch.setattr(gpu_suite, "Worker", lambda: workers.append(Here()) or workers[-1])
    parts = [part("first", plan_rows), part("second", plan_interrupt), part("third", plan_rows)]
    code, outcomes = run_suite(parts, tmp_path, note="a note")
    assert code == 130
    assert list(outcomes) == ["first"]
    assert all(worker.ended for worker in workers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gpu_suite on ")
    assert lines[1] == "a note"
    assert lines[2].startswith(f"first  {DONE}")
    assert lines[3:] == ["1 rows"]


def test_the_summary_fits_the_end_of_the_output(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_suite, "Worker", Here)
    _, outcomes = run_suite([part(f"part {i}", plan_errors) for i in range(30)], tmp_path)
    assert len(outcomes) == 30
    assert len(capsys.readouterr().out.splitlines()) == gpu_suite.LINES


def test_a_part_that_can_not_be_planned_fails():
    def plan_nothing(device):
        raise ValueError("no\nplan")

    messages = list(gpu_suite.messages(part("x", plan_nothing), CPU))
    assert messages == [("error", "ValueError: no"), ("tasks", 0), ("end", None)]


def test_the_suite_has_every_benchmark_and_fits():
    for quick in (False, True):
        parts = gpu_suite.suite(quick, 0)
        assert {p.benchmark.name for p in parts} == {*MODULES, "kernels", "network"}
        assert [p.check for p in parts] == [True, True] + [False] * (len(parts) - 2)
        assert len({p.name for p in parts}) == len(parts)
        for p in parts:
            if not p.needs_cuda:
                assert p.benchmark.plan(CPU, **p.settings)


def test_the_suite_runs_on_the_cpu(tmp_path, capsys):
    """From the command to the summary, all parts; Inductor's too."""
    arguments = ["--device", "cpu", "--quick", "--minutes", "5", "--out", str(tmp_path / "new")]
    assert gpu_suite.main(arguments) == 0
    saved = json.loads((tmp_path / "new" / "summary.json").read_text())
    statuses = {row["part"]: row["status"] for row in saved["rows"]}
    assert statuses.pop("sparse_mm") == NEEDS_CUDA
    assert set(statuses.values()) == {DONE}
    for name in statuses:
        rows = json.loads((tmp_path / "new" / f"{name}.json").read_text())["rows"]
        assert len(rows) == next(r["rows"] for r in saved["rows"] if r["part"] == name) > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "dry run with small shapes: the figures mean nothing"
    assert any(line.startswith("kernels against the reference: 72 of 72") for line in lines)
    assert any(line.startswith("compiled network against eager: 1 of 1") for line in lines)


@pytest.mark.gpu
def test_the_suite_runs_on_the_gpu(tmp_path):
    assert gpu_suite.main(["--device", "cuda", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {DONE}
