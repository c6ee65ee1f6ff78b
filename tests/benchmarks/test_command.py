"""Test what commands have in common: what they run, save, show and refuse, never how fast it is."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")

from benchmarks import (
    ceilings,
    convolutions,
    gpu_suite,
    prune_op,
    sparse_mm,
    train_step,
    whole_channels,
)

from ..conftest import HAS_GPU

ROOT = Path(__file__).parents[2]
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
}


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
    """Run the whole command, as a user sees it."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.ceilings", "--copy-mib", "1", "--matmul", "2048"]
    command += ["--device", "cpu", "--seconds", "60", "--dtype", "float32", "--out", str(out)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell may have started these tests with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
