"""Inductor's lowering of the prune: its values, what it is fused with, when it is not used.

The generated Triton code is run in Triton's interpreter, on CPU tensors.
"""

import re

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton", reason="needs Triton")

import sdgp_fx.inductor.lowering  # noqa: F401  (Registers the lowering.)
from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.inductor.pruning_functions import prune_group
from sdgp_fx.kernels import reference
from sdgp_fx.kernels.op import STOCHASTIC

from ..conftest import HAS_GPU
from ..helpers.generated import gpu_code, kernels

PATTERNS = [(1, 2), (2, 4), (3, 4), (4, 8), (24, 32)]

OWN_KERNEL = "sdgp.prune_nm.default("  # called in generated code

interpreted = pytest.mark.skipif(HAS_GPU, reason="Triton compiles for the GPU here")


def gradient(dtype, memory_format=torch.channels_last, channels=64):
    """With ties, zeros, groups of zeros, NaN, infinities, and values too large to be scaled."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, channels, 3, 5, generator=generator).round(decimals=1).to(dtype)
    x[0, :3, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x[0, -4:, 1, 0] = torch.tensor([-0.7, 0.7, 0.6, 0.5]) * torch.finfo(dtype).max
    x[1, :, 1, 1] = 0
    return x.to(memory_format=memory_format)


def prune_op(x, n, m, prune, rescale="group"):
    seed = torch.full((1,), 77, device=x.device) if prune in STOCHASTIC else None
    return torch.ops.sdgp.prune_nm(x, seed, n, m, prune, rescale, 1)


def reference_prune(x, n, m, prune):
    return reference.prune_nm(x, torch.tensor([77]), n, m, prune, "group")


def prune_twice(x):
    """Two prunes that could be fused with each other."""
    pruned = prune_op(x, 2, 4, "magnitude")
    return pruned, prune_op(pruned, 1, 4, "magnitude")


def assert_same(actual, expected, relative=0.0):
    torch.testing.assert_close(actual, expected, rtol=relative, atol=0, equal_nan=True)
    assert actual.stride() == expected.stride()


# CPUs, where nothing is fused


@pytest.fixture(autouse=True)
def no_code_of_another_lowering():
    """A graph with the operator is cached without regard to how that is lowered."""
    with inductor_config.patch(fx_graph_cache=False):
        yield


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cpu_calls_the_operator(dtype, memory_format):
    cases = [(2, 4, prune) for prune in PRUNING_FUNCTIONS]

    def prune_all(x):
        return [prune_op(x + x, *case) for case in cases]

    x = gradient(dtype, memory_format)
    results, (code,) = run_and_get_code(torch.compile(prune_all, fullgraph=True), x)
    assert code.count(OWN_KERNEL) == len(cases)
    for result, case in zip(results, cases, strict=True):
        assert_same(result, reference_prune(x + x, *case))


def test_cpu_readers_of_the_pruned_gradient():
    def read(x):
        pruned, pruned_again = prune_twice(x)
        return pruned, pruned_again, pruned.unflatten(1, (-1, 4)).amax(2)

    x = gradient(torch.float32).nan_to_num()
    for result, expected in zip(torch.compile(read)(x), read(x), strict=True):
        assert_same(result, expected)


def train_small_network(backend):
    """Return the code of a backward in which weight gradients put off would take less memory."""
    torch._dynamo.reset()
    layers = []
    for inputs, outputs, stride in ((8, 8, 1), (8, 64, 8), (64, 64, 1), (64, 64, 1)):
        conv = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [conv, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(1, 8, 64, 64).to(memory_format=torch.channels_last)
    compiled = torch.compile(network, backend=backend)
    _, (_, backward) = run_and_get_code(lambda: compiled(x).sum().backward())
    return backward


def test_cpu_weight_gradients_are_not_put_off():
    """Which scatters library calls among the loops, so that there is more C++ to compile."""
    backward = train_small_network("sdgp")
    calls = re.findall(r"convolution_backward\.default\(.*(\[(?:True|False).*?\])\)", backward)
    weight_grad, input_grad = "[False, True, False]", "[True, False, False]"
    assert calls == [weight_grad, input_grad] * 3 + [weight_grad]
    assert backward.count(OWN_KERNEL) == 3
    kernels_of = re.compile(r"^cpp_fused_\w+ = ", re.M)
    stock = train_small_network("inductor")
    assert len(kernels_of.findall(backward)) == len(kernels_of.findall(stock))


def test_cpu_with_a_symbolic_batch():
    compiled = torch.compile(lambda x: prune_op(x * 2, 2, 4, "random"), dynamic=True)
    for batch in (3, 5):
        x = torch.randn(batch, 8, 2, 2)
        assert_same(compiled(x), reference_prune(x * 2, 2, 4, "random"))


def test_cpu_with_a_symbolic_number_of_channels():
    def repeated(x):
        return prune_op(torch.cat([x] * 4, dim=1), 2, 4, "magnitude")

    x = torch.randn(2, 8, 2, 2)
    torch._dynamo.mark_dynamic(x, 1)
    assert_same(torch.compile(repeated)(x), repeated(x))


def test_one_and_three_spatial_dimensions():
    for shape in ((3, 8), (3, 8, 5), (3, 8, 2, 3, 2)):
        x = torch.randn(shape)
        assert_same(torch.compile(prune_op)(x, 2, 4, "mvue"), reference_prune(x, 2, 4, "mvue"))


# Triton


def run_fused(tmp_path, x, n, m, prune):
    """gradient = x + y, and the pruned gradient, from one kernel in the interpreter."""
    y = torch.randn(x.shape).round(decimals=1).to(x.dtype)
    y = torch.empty_like(x).copy_(y)

    def produce(x, y, drawn):
        produced = x + y
        arguments = (drawn if prune in STOCHASTIC else None, n, m, prune, "group", 1)
        return produced, torch.ops.sdgp.prune_nm(produced, *arguments)

    inputs = [x, y, torch.tensor([77])]
    (kernel,) = kernels(gpu_code(produce, *inputs), tmp_path)
    outputs = [torch.full_like(x, float("nan")) for _ in range(2)]
    kernel.run(inputs, outputs)
    return x + y, *outputs


@interpreted
@pytest.mark.parametrize(
    ("n", "m", "prune"),
    [
        (n, m, prune)
        for n, m in PATTERNS
        for prune in PRUNING_FUNCTIONS
        if (n, m) == (2, 4) or prune in ("rescaled_magnitude", "mvue")
    ],
)
def test_triton_fuses_and_prunes_what_is_stored(tmp_path, n, m, prune):
    """float16 sums are rounded on their way to memory; the choice must be made after that."""
    for dtype in (torch.float16, torch.float32) if (n, m) == (2, 4) else (torch.float16,):
        dense, produced, pruned = run_fused(tmp_path, gradient(dtype, channels=32), n, m, prune)
        assert_same(produced, dense)
        # Triton chooses the order in which a tile's row is added up.
        exact = prune in ("magnitude", "random")
        relative = 0.0 if exact else reference.TOLERANCES[dtype].group_rtol
        expected = reference_prune(dense, n, m, prune)
        assert_same(pruned, expected, relative)
        assert torch.equal(pruned == 0, expected == 0)


@interpreted
def test_triton_sees_bfloat16_as_it_is_stored(tmp_path):
    """Values that bfloat16 does not tell apart are a tie, and the lower channel is kept."""
    x = torch.tensor([256, 256, 1, 2], dtype=torch.bfloat16).view(1, 4, 1, 1)
    y = torch.tensor([0, 0.125, 0, 0], dtype=torch.bfloat16).view(1, 4, 1, 1)

    def produce(x, y):
        produced = x + y
        return produced, torch.ops.sdgp.prune_nm(produced, None, 1, 4, "magnitude", "group", 1)

    (kernel,) = kernels(gpu_code(produce, x, y), tmp_path)
    outputs = [torch.full_like(x, float("nan")) for _ in range(2)]
    kernel.run([x, y], outputs)
    assert outputs[1].flatten().tolist() == [256, 0, 0, 0]


@interpreted
def test_triton_in_place_of_any_strides(tmp_path):
    x = gradient(torch.float32, torch.contiguous_format)
    code = gpu_code(lambda x: (prune_op(x, 2, 4, "magnitude"),), x)
    (kernel,) = kernels(code, tmp_path)
    output = torch.full_like(x, float("nan"))
    kernel.run([x], [output])
    assert_same(output, reference_prune(x, 2, 4, "magnitude"))


@interpreted
def test_triton_reader_of_the_pruned_gradient(tmp_path):
    x = gradient(torch.float32)
    (kernel,) = kernels(gpu_code(prune_twice, x), tmp_path)
    outputs = [torch.full_like(x, float("nan")) for _ in range(2)]
    kernel.run([x], outputs)
    for output, expected in zip(outputs, prune_twice(x), strict=True):
        assert_same(output, expected)


# When the operator's own kernel is called


def calls_own_kernel(function, *inputs):
    return gpu_code(lambda *args: (function(*args),), *inputs).count(OWN_KERNEL)


def test_gpu_cases_of_the_own_kernel():
    x = torch.randn(2, 8, 2, 2)
    assert not calls_own_kernel(lambda x: prune_op(x, 2, 4, "magnitude"), x)
    for scope in ("feature_map", "channel"):
        assert calls_own_kernel(lambda x, s=scope: prune_op(x, 2, 4, "rescaled_magnitude", s), x)
    # The scope is only read by rescaled_magnitude.
    assert not calls_own_kernel(lambda x: prune_op(x, 2, 4, "magnitude", "channel"), x)


@pytest.mark.parametrize(
    "options",
    [
        {"triton.persistent_reductions": False},
        {"triton.multi_kernel": 1},
        {"triton.cooperative_reductions": True},
        {"triton.force_cooperative_reductions": True},
        {"cuda_backend": "halide"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_divide_a_tile_bring_the_own_kernel(options):
    x = torch.randn(2, 8, 2, 2)
    with inductor_config.patch(options):
        assert calls_own_kernel(lambda x: prune_op(x, 2, 4, "magnitude"), x)


def test_an_unknown_function_is_refused():
    """Ahead of this the operator's checks refuse it."""
    with pytest.raises(ValueError, match="the lowering has no pruning function 'best'"):
        prune_group(2, 4, "best", torch.float32, lambda index: None, None, None, [])


def test_nothing_to_prune():
    x = torch.randn(0, 8, 2, 2)
    assert torch.compile(lambda x: prune_op(x, 2, 4, "magnitude"))(x).shape == x.shape
