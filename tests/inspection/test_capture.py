"""Test the joint graphs that capture, the log and a trace get."""

import json
import logging
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import sdgp_fx
from sdgp_fx import SDGPConfig, graph_pass
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD

from ..helpers.graphs import random_inputs, run

EAGER = {"sdgp.inner": "aot_eager"}
CACHE = functorch_config.enable_autograd_cache


def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def step(network, options=EAGER):
    torch.compile(network, backend="sdgp", options=options)(
        torch.randn(2, 3, 9, 9)
    ).sum().backward()


def count(gm, target):
    return len(gm.graph.find_nodes(op="call_function", target=target))


def test_before_and_after_of_a_graph():
    with sdgp_fx.capture() as captured:
        step(model())
    (graph,) = captured
    assert [count(gm, PRUNE_NM) for gm in (graph.before, graph.after)] == [0, 1]
    assert [count(gm, CONVOLUTION_BACKWARD) for gm in (graph.before, graph.after)] == [2, 3]
    assert [d.module for d in graph.decisions if d.pruned] == ["2"]
    assert captured.cached == 0
    assert captured[0] is graph
    for gm in (graph.before, graph.after):
        assert all("val" in node.meta for node in gm.graph.find_nodes(op="placeholder"))


def test_both_graphs_run():
    """Both graphs are complete, and differ as a pruned gradient does from a dense one."""
    with sdgp_fx.capture() as captured:
        step(model())
    (graph,) = captured
    inputs = random_inputs(graph.before)
    with torch.no_grad():
        dense, pruned = (gm(*inputs) for gm in (graph.before, graph.after))
    same = [torch.equal(a, b) for a, b in zip(dense, pruned, strict=True) if a is not None]
    assert True in same
    assert False in same
    prunes = [value for name, value in run(graph.after, inputs).items() if "prune_nm" in name]
    assert (prunes[0] != 0).float().mean() == 0.5


def test_a_diff_has_the_prune_and_nothing_of_the_forward():
    with sdgp_fx.capture() as captured:
        step(model())
    text = captured[0].diff(context=0)
    assert text.startswith("--- before\n+++ after\n")
    changed = [line for line in text.splitlines()[2:] if line[0] in "+-"]
    assert sum("sdgp.prune_nm" in line for line in changed if line[0] == "+") == 1
    assert not any("sdgp.prune_nm" in line for line in changed if line[0] == "-")
    assert not any("relu" in line.split("=")[0] for line in changed)
    assert captured[0].diff() in str(captured[0])
    assert str(captured[0]) in str(captured)


def test_a_graph_break_makes_two_and_captures_nest():
    class Broken(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            torch._dynamo.graph_break()
            return self[2](x)

    with sdgp_fx.capture() as outer:
        with sdgp_fx.capture() as inner:
            step(Broken(*model()))
        assert len(inner) == len(outer) == 2
        torch._dynamo.reset()
        step(model())
    assert (len(inner), len(outer)) == (2, 3)
    assert inner[1] is outer[1]
    assert outer[:2] == list(inner)
    assert graph_pass.observers.get() == ()


def test_what_is_no_training_graph_or_compiled_already_is_not_captured():
    network = model()
    step(network)
    with sdgp_fx.capture() as captured:
        step(network)
        with torch.no_grad():
            torch.compile(network, backend="sdgp", options=EAGER)(torch.randn(2, 3, 9, 9))
        sdgp_fx.explain(network, torch.randn(2, 3, 9, 9))
    assert len(captured) == 0
    assert "no joint graph" in str(captured)


def test_a_graph_that_the_pass_gets_twice_is_there_once():
    with sdgp_fx.capture() as captured:
        step(model())
        the_pass = graph_pass.PruneInputGrads(SDGPConfig())
        the_pass(captured[0].after.graph)
    assert len(captured) == 1


def test_nothing_is_copied_while_nobody_looks(monkeypatch):
    def refuse(*_):
        raise AssertionError

    # pytest listens to all of torch's logs.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    monkeypatch.setattr(graph_pass, "_copy", refuse)
    monkeypatch.setattr(graph_pass, "readable", refuse)
    step(model())


def test_a_thread_sees_its_own_graphs_alone():
    """Captures that begin and end in turn, each with a network of its own number of layers."""
    began, ended, seen = threading.Barrier(2), threading.Barrier(2), {}

    def train(layers):
        with sdgp_fx.capture() as captured:
            began.wait(60)
            step(nn.Sequential(nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1) for _ in range(layers))))
            ended.wait(600)
            seen[layers] = [len(graph.decisions) - 1 for graph in captured]

    with sdgp_fx.capture() as outside:
        threads = [threading.Thread(target=train, args=(layers,)) for layers in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {1: [1], 2: [2]}
    assert len(outside) == 0
    assert functorch_config.enable_autograd_cache == CACHE


def test_an_error_ends_the_capture():
    with pytest.raises(RuntimeError, match="mine"), sdgp_fx.capture():
        raise RuntimeError("mine")
    assert graph_pass.observers.get() == ()


def test_caches(monkeypatch):
    """AOTAutograd's cache hides the pass, so capture bypasses it; Inductor's stays in use.

    The cache keys are the same inside and outside.
    """
    options = {"sdgp.inner": "inductor"}

    def use(context):
        torch._dynamo.reset()
        counters.clear()
        with context as captured:
            step(model(), options)
        hits = counters["aot_autograd"]["autograd_cache_hit"]
        return hits, counters["inductor"]["fxgraph_cache_miss"], captured

    with fresh_cache():
        hits, misses, _ = use(nullcontext())
        assert hits == 0
        assert misses > 0
        hits, misses, captured = use(sdgp_fx.capture())
        assert (hits, misses, len(captured), captured.cached) == (0, 0, 1, 0)
        assert use(nullcontext())[:2] == (1, 0)

        in_use = SimpleNamespace(patch=lambda **_: nullcontext())
        monkeypatch.setattr(graph_pass, "functorch_config", in_use)
        hits, misses, captured = use(sdgp_fx.capture())
        assert (hits, misses, len(captured), captured.cached) == (1, 0, 0, 1)
        assert "1 graphs came from AOTAutograd's cache" in str(captured)


def test_the_log_has_the_diff_at_debug_only(caplog):
    for level, has_diff in ((logging.INFO, False), (logging.DEBUG, True)):
        torch._dynamo.reset()
        caplog.clear()
        with caplog.at_level(level, logger="sdgp_fx"):
            step(model())
        messages = [r.getMessage() for r in caplog.records if r.name.startswith("sdgp_fx")]
        assert any(message.startswith("--- before") for message in messages) == has_diff
        assert sum("Decision(" in message for message in messages) == 2


def test_torch_logs_and_torch_trace(tmp_path):
    code = """
import torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
compiled = torch.compile(model, backend="sdgp", options={"sdgp.inner": "aot_eager"})
compiled(torch.randn(2, 3, 9, 9)).sum().backward()
"""
    environment = {**os.environ, "TORCH_LOGS": "+sdgp_fx", "TORCH_TRACE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert "sdgp.prune_nm" in run.stderr
    assert "Decision(module='2'" in run.stderr

    (trace,) = tmp_path.iterdir()
    payloads = {}
    lines = iter(trace.read_text().splitlines())
    name = None
    for line in lines:
        if not line.startswith("\t"):
            artifact = json.loads(line[line.index("{") :]).get("artifact", {})
            name = artifact.get("name")
        elif name:
            payloads.setdefault(name, []).append(line[1:])
    texts = {name: "\n".join(lines) for name, lines in payloads.items() if name.startswith("sdgp_")}
    assert texts.keys() == {
        *("sdgp_joint_graph_before", "sdgp_joint_graph_after", "sdgp_joint_graph_diff"),
        "sdgp_decisions",
    }
    assert "sdgp.prune_nm" in texts["sdgp_joint_graph_after"]
    assert "sdgp.prune_nm" not in texts["sdgp_joint_graph_before"]
    assert [d["pruned"] for d in json.loads(texts["sdgp_decisions"])] == [True, False]


def test_products_are_a_step_of_their_own():
    """What is pruned is shown as it is defined, and then as it is computed."""
    with sdgp_fx.capture() as captured:
        step(model(), {**EAGER, "sdgp.product": "sparse"})
    (graph,) = captured
    steps = (graph.before, graph.pruned, graph.after)
    assert [count(gm, PRUNE_NM) for gm in steps] == [0, 1, 0]
    assert [count(gm, PRUNED_INPUT_GRAD) for gm in steps] == [0, 0, 1]
    pruning, products = graph.diff(end="pruned"), graph.diff(start="pruned")
    assert "sdgp.prune_nm" in pruning
    assert "sdgp.pruned_input_grad" not in pruning
    assert "sdgp.pruned_input_grad" in products
    assert f"{pruning}\n{products}" in str(captured)
    assert "sdgp.prune_nm" not in graph.diff()
