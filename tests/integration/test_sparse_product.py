"""Test training with products that skip zeros, by both inner compilers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor_config

from sdgp_fx.config import INNER_COMPILERS
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD

SPARSE = {"sdgp.targets": "conv,linear", "sdgp.product": "sparse"}


class Net(nn.Module):
    """Network with convolutions of many kinds and a linear layer over positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(4, 32),
            nn.Conv2d(32, 32, 3, padding=1, groups=4),
        )
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.mix = nn.Linear(16, 12)

    def forward(self, x):
        x = F.gelu(self.stem(x))
        x = x + self.up(F.gelu(self.block(x)))
        return self.mix(x.movedim(1, -1)).mean((1, 2))


class TwoLayers(nn.Module):
    """A network that Inductor compiles sooner."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.mix = nn.Linear(32, 12)

    def forward(self, x):
        x = F.gelu(self.down(F.gelu(self.stem(x))))
        return self.mix(x.movedim(1, -1)).mean((1, 2))


@pytest.fixture(autouse=True)
def _no_cache():
    """Rewrite every graph: one that Inductor has kept does not go through the pass again."""
    with inductor_config.patch(fx_graph_cache=False):
        yield


def gradients(
    product, inner, memory_format, dtype=torch.float32, batches=(4,), network=Net, **options
):
    """Return the gradients of a step of each batch, by step."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = network().to(memory_format=memory_format)
    options = {**SPARSE, "sdgp.product": product, "sdgp.inner": inner, **options}
    compiled = torch.compile(model, backend="sdgp", options=options)
    results = []
    for batch in batches:
        model.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(batch, 3, 12, 12).to(memory_format=memory_format)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = compiled(x).float().square().sum()
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return results


def count_products(rewritten):
    return [
        len(graph.find_nodes(op="call_function", target=PRUNED_INPUT_GRAD))
        for graph, _ in rewritten
    ]


@pytest.mark.parametrize("inner", INNER_COMPILERS)
@pytest.mark.parametrize(
    ("prune", "memory_format"),
    [("magnitude", torch.contiguous_format), ("mvue", torch.channels_last)],
)
def test_gradients_are_those_of_the_dense_product(prune, inner, memory_format, rewritten):
    settings = {"memory_format": memory_format, "sdgp.prune": prune}
    # Inductor draws other random numbers, and compiles both then.
    compiles_both = (prune, inner) == ("mvue", "inductor")
    settings["network"] = TwoLayers if compiles_both else Net
    (dense,) = gradients("dense", inner if compiles_both else "aot_eager", **settings)
    assert count_products(rewritten) == [0]
    (sparse,) = gradients("sparse", inner, **settings)
    assert count_products(rewritten) == [0, 2 if compiles_both else 4]
    for name, expected in dense.items():
        error = (sparse[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 1e-4, name


@pytest.mark.parametrize(
    ("inner", "rescale", "network"),
    [
        ("aot_eager", "group", Net),
        ("aot_eager", "feature_map", Net),
        ("inductor", "group", TwoLayers),
    ],
)
def test_dynamic_batch(inner, rescale, network, rewritten):
    """The third batch is compiled for no more."""
    settings = {"memory_format": torch.channels_last, "batches": (4, 5, 7), "network": network}
    settings["sdgp.rescale"] = rescale
    dense = gradients("dense", "aot_eager", **settings)
    sparse = gradients("sparse", inner, **settings)
    layers = 4 if network is Net else 2
    assert count_products(rewritten) == [0, 0, layers, layers]
    for mine, others in zip(sparse, dense, strict=True):
        for name, expected in others.items():
            torch.testing.assert_close(mine[name], expected, rtol=1e-3, atol=1e-4)


def test_autocast(rewritten):
    settings = {"memory_format": torch.channels_last, "dtype": torch.bfloat16}
    settings["network"] = TwoLayers
    (dense,) = gradients("dense", "aot_eager", **settings)
    (sparse,) = gradients("sparse", "inductor", **settings)
    assert count_products(rewritten) == [0, 2]
    for name, expected in dense.items():
        error = (sparse[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 5e-2, name  # bfloat16, and nearly equal values that change places.
