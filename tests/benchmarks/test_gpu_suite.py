"""Test the suite: only a wrong kernel stops it, and it reports what became of each part."""

import json
import os
import subprocess
import time
from functools import partial

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")

from benchmarks import gpu_suite
from benchmarks.gpu_suite import NEEDS_CUDA
from benchmarks.harness import correctness, report, worker
from benchmarks.harness.benchmark import Benchmark, Task
from benchmarks.harness.worker import DONE, FAILED, NO_TIME, Part
from sdgp_fx.kernels.sparse import store

CPU = torch.device("cpu")
BENCHMARKS = ["ceilings", "convolutions", "products", "prune_op", "sparse_mm", "train_step"]
BENCHMARKS += ["whole_channels"]
CHECKS = ["kernels", "network", "products_check"]


def nothing(rows):
    return [f"{len(rows)} rows"]


def part(name, plan, share=1.0, **kwargs):
    return Part(name, Benchmark(name, plan, {}, nothing), {}, share, **kwargs)


def plan_wrong_kernel(device):
    """Plan a check of a kernel that keeps one value too many.

    A plan runs in the suite's process, where the kernel can be replaced.
    """

    def wrong(x, seed, n, *settings):
        return correct(x, seed, n + 1, *settings)

    correct, correctness.prune_nm = correctness.prune_nm, wrong
    case = correctness.Case("magnitude", "group", 4, "float32", "channels_last", (3, 12, 5, 7))
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


@pytest.mark.slow
def test_nothing_a_part_does_stops_the_suite(tmp_path, capsys):
    (tmp_path / "death.json").write_text("of an earlier run")
    parts = [
        part("fine", plan_rows),
        # In the process of the part before, which has started.
        part("sleep", plan_sleep, share=0.03),
        part("death", plan_death),
        part("errors", plan_errors),
        part("late", plan_rows, least=99),
    ]
    begin = time.monotonic()
    code, outcomes = run_suite(parts, tmp_path)
    assert code == 0
    assert time.monotonic() - begin < 90
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "fine": DONE,
        "sleep": NO_TIME,
        "death": FAILED,
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
    dead = worker.Worker()
    dead.process.kill()
    dead.process.join()
    try:
        arguments = (part("x", plan_rows), CPU, report.Report("x", {}, {}), time.monotonic() + 60)
        status, _, errors = dead.run(*arguments)
    finally:
        dead.end()
    assert status == FAILED
    assert errors == ["the process ended with exit code -9"]


class Here:
    """Run a worker in this process."""

    def __init__(self):
        self.ended = False

    def run(self, part, device, report, deadline):
        errors = []
        for kind, value in worker.messages(part, device):
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
    assert all(here.ended for here in workers)
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

    messages = list(worker.messages(part("x", plan_nothing), CPU))
    assert messages == [("error", "ValueError: no"), ("tasks", 0), ("end", None)]


def test_the_suite_has_every_benchmark():
    parts = gpu_suite.suite(False, 0)
    assert {p.benchmark.name for p in parts} == {*BENCHMARKS, *CHECKS}
    assert [p.check for p in parts] == [True] * 3 + [False] * (len(parts) - 3)
    assert len({p.name for p in parts}) == len(parts)
    for p in parts:
        if not p.needs_cuda:
            assert p.benchmark.tasks(CPU, p.settings)


@pytest.mark.slow
def test_the_suite_runs_on_the_cpu(tmp_path, capsys, monkeypatch):
    """Run everything from the command to the summary, with all parts, Inductor's too."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "sm_90-0.json").write_text("{}")
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "store")
    arguments = ["--device", "cpu", "--quick", "--minutes", "5", "--out", str(tmp_path / "new")]
    assert gpu_suite.main([*arguments, "--kernels", str(tmp_path / "kernels")]) == 0
    assert (tmp_path / "store" / "sm_90-0.json").exists()
    saved = json.loads((tmp_path / "new" / "summary.json").read_text())
    statuses = {row["part"]: row["status"] for row in saved["rows"]}
    assert statuses.pop("sparse_mm") == NEEDS_CUDA
    assert set(statuses.values()) == {DONE}
    columns = {part.name: part.benchmark.columns for part in gpu_suite.suite(True, 0)}
    for name in statuses:
        rows = json.loads((tmp_path / "new" / f"{name}.json").read_text())["rows"]
        assert len(rows) == next(r["rows"] for r in saved["rows"] if r["part"] == name) > 0
        for key, _ in columns[name].values():
            assert all(key in row for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "dry run with small shapes: the figures mean nothing"
    assert any(line.startswith("kernels against the reference: 72 of 72") for line in lines)
    assert any(line.startswith("compiled network against eager: 1 of 1") for line in lines)


@pytest.mark.parametrize("suite_code", [0, 1])
def test_the_rest_of_the_time_trains_the_table(suite_code, tmp_path, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(gpu_suite, "run_suite", lambda *arguments: suite_code)
    monkeypatch.setattr(subprocess, "run", run)
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--root", "cifar"]
    assert gpu_suite.main(arguments) == (1 if suite_code else 7)
    assert len(commands) == 1 - suite_code
    for command in commands:
        assert command[1:4] == ["-m", "benchmarks.paper", "table1"]
        assert {"--root", "cifar", str(tmp_path / "table1.json")} <= set(command)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_suite_runs_on_the_gpu(tmp_path):
    assert gpu_suite.main(["--device", "cuda", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {DONE}
