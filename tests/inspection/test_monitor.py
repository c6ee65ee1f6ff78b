"""Test sdgp_fx.monitor: statistics against their definition, and a model that doesn't notice."""

import copy
import math

import pytest
import torch
from torch import nn

import sdgp_fx
from sdgp_fx import SDGPConfig, backend, graph_pass
from sdgp_fx.inspection.monitor import STATISTICS
from sdgp_fx.kernels import op, reference
from sdgp_fx.kernels.record import RECORD, STEP
from sdgp_fx.passes.statistics import record_statistics

from ..helpers.graphs import joint_graph

EAGER = {"sdgp.inner": "aot_eager"}

# For sums in float32 of at most 2000 terms, compared with float64.
TOLERANCE = {"rel": 1e-5}


class Net(nn.Module):
    """Network with a layer that is called twice, and with randomness of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.ConvTranspose2d(8, 8, 3)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(self.first(x).relu())))
        return self.linear(self.last(self.dropout(x)).movedim(1, -1))


@pytest.fixture
def model():
    return Net()


def images(number=0):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, 3, 10, 10, generator=generator)


def train(network, model, steps, x=images):
    torch.manual_seed(1)
    for number in range(steps):
        network(x(number)).square().mean().backward()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


# Recorded statistics


@pytest.fixture
def pruned(monkeypatch):
    """Record every (dense, pruned) pair that the operator's kernel saw."""
    seen, prepare = [], op._prepare

    def spy_on(*arguments):
        compute = prepare(*arguments)

        def spy(grad_output, seed):
            result = compute(grad_output, seed)
            seen.append((grad_output, result))
            return result

        return spy

    monkeypatch.setattr(op, "_prepare", spy_on)
    monkeypatch.setattr(op, "_prepared", {})
    return seen


def defined(pairs):
    """Compute the statistics of a layer's gradients from their definition."""
    g, p = (torch.cat([t.flatten().double() for t in side]) for side in zip(*pairs, strict=True))
    return {
        "l1_kept": (g.abs()[p != 0].sum() / g.abs().sum()).item(),
        "relative_error": ((p - g).norm() / g.norm()).item(),
        "bias": (torch.dot(p, g) / torch.dot(g, g)).item(),
    }


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"prune": "mvue", "m": 8}, torch.bfloat16),
        ({"prune": "random"}, torch.float32),
        ({"prune": "magnitude", "n": 1}, torch.float64),
        ({"rescale": "feature_map", "targets": "conv,linear"}, torch.float32),
        ({"rescale": "channel", "targets": "conv,linear"}, torch.bfloat16),
    ],
)
def test_statistics_are_those_of_the_definition(model, pruned, options, dtype):
    model.to(dtype)
    keys = {f"sdgp.{name}": value for name, value in options.items()}
    monitor = sdgp_fx.monitor(model, options={**keys, **EAGER})
    train(monitor, model, 1, lambda number: images(number).to(dtype))
    if options.get("rescale") == "channel":
        # The weight has the factors here; the operator is told to prune by magnitude alone.
        config = SDGPConfig(**options)
        for i, (dense, kept) in enumerate(pruned):
            factor = reference.channel_factor(dense, config.n, config.m)
            pruned[i] = dense, kept * factor.view(-1, *[1] * (dense.dim() - 2))
    layers = ["linear"] if "targets" in options else []
    expected = dict(zip([*layers, "last", "twice"], [[pair] for pair in pruned], strict=False))
    expected["twice"] = pruned[-2:]
    record = monitor.to_dict()
    # With m = 8, the layer that is called twice has only 4 channels per group.
    if options.get("m") == 8:
        del expected["twice"]
    assert list(record) == list(reversed(expected))
    for name, pairs in expected.items():
        assert record[name].pop("step") == [0]
        for key, value in defined(pairs).items():
            assert record[name][key] == [pytest.approx(value, **TOLERANCE)]


def test_inductor_records_the_same():
    model, records = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), []
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        options = {"sdgp.inner": inner, "sdgp.rescale": "channel"}
        monitor = sdgp_fx.monitor(model, options=options)
        monitor(images()).square().mean().backward()
        records.append(monitor.to_dict())
    eager, compiled = records
    assert list(eager) == list(compiled) == ["1", "2"]
    for name, record in eager.items():
        for key, values in record.items():
            assert compiled[name][key] == pytest.approx(values, rel=1e-4), (name, key)


def test_a_gradient_of_zeros_is_no_error(model):
    monitor = sdgp_fx.monitor(model, options=EAGER)
    (monitor(images()) * 0).sum().backward()
    assert all(math.isnan(value) for value in monitor.to_dict()["last"]["bias"])


# Times of recording


def test_every_so_many_calls_with_gradients(model):
    monitor = sdgp_fx.monitor(model, every=3, options=EAGER)
    train(monitor, model, 4)
    with torch.no_grad():
        for _ in range(3):
            monitor(images())
    train(monitor, model, 3)
    assert {tuple(record["step"]) for record in monitor.to_dict().values()} == {(0, 3, 6)}
    monitor.step = 999  # As after loading a checkpoint.
    train(monitor, model, 1)
    assert monitor.to_dict()["last"]["step"] == [0, 3, 6]
    train(monitor, model, 1)
    assert monitor.step == 1001
    assert monitor.to_dict()["last"]["step"] == [0, 3, 6]


def test_a_step_of_several_backwards_is_one_record(model):
    monitor = sdgp_fx.monitor(model, options=EAGER)
    monitor(images()).square().mean().backward()
    once = monitor.to_dict()
    monitor.step = -1
    monitor(images()).square().mean().backward()
    assert monitor.to_dict()["last"]["step"] == once["last"]["step"] == [0]


def test_its_backend_records_for_a_model_that_a_trainer_holds(model, monkeypatch):
    monkeypatch.setenv("SDGP_INNER", "aot_eager")
    monitor = sdgp_fx.monitor(model)
    model.compile(backend="sdgp")
    for monitor.step in range(3):
        backend = monitor.backend if monitor.step != 1 else None
        with torch.compiler.set_stance("default", force_backend=backend):
            train(model, model, 1)
    assert monitor.to_dict()["last"]["step"] == [0, 2]


@pytest.mark.parametrize(
    "options", [EAGER, {"sdgp.inner": "inductor"}, {"sdgp.inner": "inductor", "cpp_wrapper": True}]
)
def test_a_backward_counts_for_its_forwards_step(options):
    """Other forwards may come in between: of a discriminator, of micro-batches, of a pipeline."""
    name = 'a "quoted", name'

    def make(options):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        model.add_module(name, nn.Conv2d(8, 8, 3))
        return sdgp_fx.monitor(model, every=2, options=options)

    expected = []
    for number in range(3):
        torch.manual_seed(0)
        alone = make(EAGER)
        alone(images(number)).square().sum().backward()
        expected += alone.to_dict()[name]["bias"]
    torch.manual_seed(0)
    monitor = make(options)
    losses = [monitor(images(number)).square().sum() for number in (0, 7, 1, 7, 2)]
    assert len(set(expected)) == 3
    for loss in (losses[4], losses[1], losses[0], losses[2], losses[3]):
        loss.backward()
    record = monitor.to_dict()
    assert list(record) == [name]
    assert record[name]["step"] == [0, 2, 4]
    assert record[name]["bias"] == pytest.approx(expected, rel=1e-6)


def test_the_forward_alone_reads_the_step(model, monkeypatch):
    parts = []
    partition = backend.min_cut_rematerialization_partition

    def spy(joint, inputs, **kwargs):
        parts.extend(partition(joint, inputs, **kwargs))
        return parts

    monkeypatch.setattr(backend, "min_cut_rematerialization_partition", spy)
    train(sdgp_fx.monitor(model, options=EAGER), model, 1)
    counts = [len(part.graph.find_nodes(op="call_function", target=STEP)) for part in parts]
    assert counts == [1, 0]


def test_two_forwards_of_one_loss_are_two_steps(model):
    monitor = sdgp_fx.monitor(model, every=2, options=EAGER)
    for number in range(2):
        real, fake = (monitor(images(i)) for i in (number, 7))
        (real - fake).square().mean().backward()
    assert monitor.to_dict()["last"]["step"] == [0, 2]


def test_monitors_of_two_models_are_apart_and_may_go():
    models = [Net(), Net()]
    monitors = [sdgp_fx.monitor(model, options=EAGER) for model in models]
    outputs = [monitor(images()) for monitor in monitors]
    outputs[1].square().mean().backward()
    assert list(monitors[1].to_dict()) == ["twice", "last"]
    assert not monitors[0].to_dict()
    monitors.clear()
    outputs[0].square().mean().backward()


# Effects on the model


@pytest.mark.parametrize("prune", ["mvue", "rescaled_magnitude"])
def test_training_is_bit_identical_with_and_without(prune):
    options = {**EAGER, "sdgp.prune": prune}
    states = []
    for compiled in (
        lambda model: torch.compile(model, backend="sdgp", options=options),
        lambda model: sdgp_fx.monitor(model, every=2, options=options),
    ):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net()
        train(compiled(model), model, 4)
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_off_the_graphs_are_what_they_were_and_on_nothing_else_is_added(model, monkeypatch):
    joints = []
    partition = backend.min_cut_rematerialization_partition

    def spy(joint, inputs, **kwargs):
        joints.append(joint.graph)
        return partition(joint, inputs, **kwargs)

    monkeypatch.setattr(backend, "min_cut_rematerialization_partition", spy)
    train(torch.compile(model, backend="sdgp", options=EAGER), model, 1)
    torch._dynamo.reset()
    train(sdgp_fx.monitor(model, every=2, options=EAGER), model, 2)
    without, on, off = joints
    assert str(off) == str(without) != str(on)
    for target in (RECORD, STEP):
        (node,) = on.find_nodes(op="call_function", target=target)
        on.erase_node(node)
    on.eliminate_dead_code()
    assert str(on) == str(without)


def test_inductors_key_tells_the_graphs_apart():
    plain = graph_pass.PruneInputGrads(SDGPConfig())
    recording = [graph_pass.PruneInputGrads(SDGPConfig(), monitor=key) for key in "01"]
    assert len({plain.uuid(), *(rewrite.uuid() for rewrite in recording)}) == 3


def test_a_second_run_of_the_pass_adds_nothing(model):
    graph = joint_graph(model, images()).graph
    graph_pass.PruneInputGrads(SDGPConfig(), monitor="0")(graph)
    before = str(graph)
    record_statistics(graph, "0")
    assert str(graph) == before
    assert len(graph.find_nodes(op="call_function", target=RECORD)) == 1


def test_nothing_pruned_nothing_recorded(model):
    graph = joint_graph(model, images()).graph
    before = str(graph)
    record_statistics(graph, "0")
    assert str(graph) == before


# What a compiled module answers


class Named(Net):
    scale = 2

    def doubled(self):
        return self.scale * 2


def test_it_answers_what_a_compiled_module_does():
    model = Named()
    compiled = torch.compile(model, backend="sdgp", options=EAGER)
    monitor = sdgp_fx.monitor(model, options=EAGER)
    assert isinstance(monitor, torch._dynamo.OptimizedModule)
    names = [name for name, _ in compiled.named_parameters()]
    assert [name for name, _ in monitor.named_parameters()] == names
    assert all(a is b for a, b in zip(monitor.parameters(), model.parameters(), strict=True))
    assert [name for name, _ in monitor.named_modules()] == [n for n, _ in compiled.named_modules()]
    assert monitor.state_dict().keys() == compiled.state_dict().keys()
    monitor.load_state_dict(compiled.state_dict())
    assert monitor.eval() is monitor
    assert not any(part.training for part in (monitor, model, model.dropout))
    assert monitor.train().training
    assert model.dropout.training
    assert monitor.first is model.first
    assert monitor.doubled() == 4
    assert "first" in dir(monitor)
    monitor.scale = 3
    assert model.scale == 3
    assert not hasattr(monitor, "no_such")
    torch.optim.SGD(monitor.parameters())
    outer = nn.Sequential(monitor)
    assert len(list(outer.parameters())) == len(list(model.parameters()))


def test_hooks_of_it_run_once_for_each_call(model):
    monitor, calls = sdgp_fx.monitor(model, every=2, options=EAGER), []
    monitor.register_forward_hook(lambda *_: calls.append(monitor.step))
    train(monitor, model, 3)
    assert calls == [0, 1, 2]


def test_a_copy_is_a_monitor_of_a_copied_model(model):
    monitor = sdgp_fx.monitor(model, every=1, options=EAGER)
    train(monitor, model, 2)
    copied = copy.deepcopy(monitor)
    assert copied.first.weight is not model.first.weight
    assert torch.equal(copied.first.weight, model.first.weight)
    assert not copied.to_dict()
    copied(images()).square().mean().backward()
    assert copied.to_dict()["last"]["step"] == [0]
    assert monitor.to_dict()["last"]["step"] == [0, 1]
    assert model.first.weight.grad is None


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"model: expected a torch\.nn\.Module, got <function"):
        sdgp_fx.monitor(images)


# Uses of the record


class Writer(list):
    def add_scalar(self, tag, value, step):
        self.append((tag, value, step))


def test_tensorboard_gets_what_is_new(model):
    monitor, writer = sdgp_fx.monitor(model, every=2, options=EAGER), Writer()
    monitor.write(writer)
    assert not writer
    train(monitor, model, 3)
    monitor.write(writer)
    monitor.write(writer)
    record = monitor.to_dict()
    expected = {
        (f"sdgp_{key}/{name}", value, step)
        for name, of in record.items()
        for key in STATISTICS
        for step, value in zip(of["step"], of[key], strict=True)
    }
    assert len(expected) == len(writer) == 2 * 2 * 3
    assert set(writer) == expected
    train(monitor, model, 2)
    monitor.write(writer)
    assert {step for *_, step in writer} == {0, 2, 4}
    assert len(writer) == 3 * 2 * 3


def test_tensorboards_own_writer_takes_it(model, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    monitor = sdgp_fx.monitor(model, options=EAGER)
    train(monitor, model, 1)
    with SummaryWriter(tmp_path) as writer:
        monitor.write(writer)
    assert list(tmp_path.iterdir())


def test_picture(model, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib")
    monitor = sdgp_fx.monitor(model, every=1, options=EAGER)
    with pytest.raises(ValueError, match="nothing is recorded"):
        monitor.plot(tmp_path / "none.png")
    train(monitor, model, 8)
    monitor.plot(tmp_path / "statistics.png")
    pixels = image.imread(tmp_path / "statistics.png")[..., :3]
    assert min(pixels.shape[:2]) > 500
    assert len({tuple(color) for row in pixels.round(2) for color in row}) > 20


@pytest.mark.parametrize("every", [0, -1, 1.0, True, "1", None])
def test_every_is_checked(model, every):
    with pytest.raises(ValueError, match=f"every: expected an int above 0, got {every!r}"):
        sdgp_fx.monitor(model, every=every)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("n", 5, r"sdgp\.n: expected"),
        (
            "structure",
            "channel",
            r"sdgp\.structure: expected 'element' with a monitor, got 'channel'",
        ),
    ],
)
def test_a_bad_option_is_a_value_error(model, option, value, message):
    with pytest.raises(ValueError, match=message):
        sdgp_fx.monitor(model, options={f"sdgp.{option}": value})(images())
