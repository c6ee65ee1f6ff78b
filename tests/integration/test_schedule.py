"""Test dense and pruned steps of one model in turn, as docs/training.md describes switching."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

EAGER = {"sdgp.inner": "aot_eager"}
PLAN = ("pruned", "pruned", "dense", "pruned", "dense", "dense", "pruned")


@pytest.fixture(autouse=True)
def _counted_from_zero():
    counters.clear()


def compilations():
    """Return the number of graphs that AOTAutograd compiled."""
    return counters["aot_autograd"]["total"]


# Has a forward outside of torch: Dynamo may skip torch's own where no other forward calls it.
class Network(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


class Convolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


def make():
    torch.manual_seed(0)
    return Network(
        Convolution(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Convolution(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 4),
    )  # fmt: skip


def two_callables(model):
    """Make a callable of its own for each state."""
    return {
        "pruned": torch.compile(model, backend="sdgp", options=EAGER),
        "dense": torch.compile(model, backend="aot_eager"),
    }


def one_stance(model):
    """Compile the model once, as any caller might, and switch torch.compiler's stance."""
    model.compile(backend="sdgp", options=EAGER)

    def dense(x):
        with torch.compiler.set_stance(force_backend="aot_eager"):
            return model(x)

    return {"pruned": model, "dense": dense}


def regions_in_stance(model):
    """Compile parts, each by itself."""
    for part in (model[0], model[3]):
        part.compile(backend="sdgp", options=EAGER)

    def dense(x):
        with torch.compiler.set_stance(force_backend="aot_eager"):
            return model(x)

    return {"pruned": model, "dense": dense}


def step(network, model, number):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    network(x).square().mean().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


def assert_same(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:sdgp pruned nothing")  # In the first region.
@pytest.mark.parametrize(
    ("switch", "graphs"), [(two_callables, 1), (one_stance, 1), (regions_in_stance, 2)]
)
def test_one_compile_per_state_and_the_bits_of_a_model_that_never_switches(switch, graphs):
    models = {name: make() for name in ("scheduled", "dense", "pruned")}
    states = switch(models["scheduled"])
    for number, state in enumerate(PLAN):
        step(states[state], models["scheduled"], number)
    assert compilations() == 2 * graphs

    # Do each step again, from the same weights, with a model that is in one state only.
    never = {name: switch(models[name])[name] for name in ("dense", "pruned")}
    follower = make()
    for number, state in enumerate(PLAN):
        models[state].load_state_dict(follower.state_dict())
        step(never[state], models[state], number)
        follower.load_state_dict(models[state].state_dict())
    assert_same(follower, models["scheduled"])
    # The states differ, so this could fail.
    models["dense"].load_state_dict(make().state_dict())
    models["pruned"].load_state_dict(make().state_dict())
    for state in never:
        step(never[state], models[state], 0)
    assert not torch.equal(models["dense"][0].weight, models["pruned"][0].weight)


def test_a_backward_is_of_the_state_that_its_forward_was_in():
    model = make()
    states = two_callables(model)
    x = torch.randn(2, 3, 8, 8)

    def gradient(loss):
        loss.backward()
        found = model[0].weight.grad
        model.zero_grad()
        return found

    def loss(state):
        return states[state](x).square().mean()

    model.eval()  # Keeps the batch's statistics out of the loss.
    alone = {state: gradient(loss(state)) for state in states}
    dense, pruned = loss("dense"), loss("pruned")
    assert torch.equal(gradient(dense), alone["dense"])
    assert torch.equal(gradient(pruned), alone["pruned"])
    assert not torch.equal(alone["dense"], alone["pruned"])


@torch._dynamo.config.patch(recompile_limit=1)
def test_other_states_count_against_the_recompile_limit():
    """States count as the page says; past the limit Dynamo runs the model as it is, dense."""
    model = make()
    states = two_callables(model)
    x = torch.randn(2, 3, 8, 8)
    states["pruned"](x)
    states["dense"](x)
    assert compilations() == 1


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled_first", [False, True])
def test_distributed_data_parallel(process_group, compiled_first):
    if compiled_first:
        model = make()
        model.compile(backend="sdgp", options=EAGER)
        wrapped = DistributedDataParallel(model)

        def dense(x):
            with torch.compiler.set_stance(force_backend="aot_eager"):
                return wrapped(x)

        states = {"pruned": wrapped, "dense": dense}
    else:
        wrapped = DistributedDataParallel(make())
        states = two_callables(wrapped)
    plain = make()
    plain_states = two_callables(plain)
    for number, state in enumerate(PLAN):
        step(states[state], wrapped, number)
    assert compilations() == 2
    for number, state in enumerate(PLAN):
        step(plain_states[state], plain, number)
    assert_same(wrapped.module, plain)


def test_a_checkpoint_is_the_models_own():
    model = make()
    states = two_callables(model)
    step(states["pruned"], model, 0)
    saved = copy.deepcopy(model.state_dict())
    step(states["dense"], model, 1)
    resumed = make()
    resumed.load_state_dict(saved)
    step(two_callables(resumed)["dense"], resumed, 1)
    assert_same(resumed, model)
