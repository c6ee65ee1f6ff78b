"""Test the C++ product of the CPU against the reference."""

import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdgp_fx.config import PRUNING_FUNCTIONS
from sdgp_fx.kernels import cpp_prune, reference
from sdgp_fx.kernels.sparse import cpu
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
from sdgp_fx.kernels.sparse.problem import Problem

from ...helpers import strategies
from ...helpers.input_grads import SEED, cases, channels_last, make_case

FUNCTIONS = [
    *((prune, "group") for prune in PRUNING_FUNCTIONS),
    ("rescaled_magnitude", "feature_map"),
    ("rescaled_magnitude", "channel"),
]

EMPTY = Path(os.devnull)

# Whether the machine has the instruction that multiplies bfloat16 by pairs.
HAS_PAIRS = "avx512_bf16" in Path("/proc/cpuinfo").read_text()


class Tolerance(NamedTuple):
    """How far a sum may be from that of the same products in float64.

    Attributes:
        of_terms: Relative to the sum of the products' sizes: a few roundings to float32, more for
            longer sums, and of the wider scopes' factors, which `TOLERANCES` of the reference
            allows 2e-6.
        of_result: Relative to the result, which is stored in the dtype: half a unit in the last
            place.

    A product of a pair of bfloat16 rounds as two multiply-adds do. That it takes subnormal numbers
    for zeros is far below this for values of an ordinary size.
    """

    of_terms: float
    of_result: float


TOLERANCES = {
    torch.float32: Tolerance(of_terms=4e-6, of_result=0),
    torch.bfloat16: Tolerance(of_terms=4e-6, of_result=2**-8),
}


@pytest.fixture(autouse=True)
def no_kept_workspace(monkeypatch):
    """Let every call have new memory, which may be filled."""
    monkeypatch.setattr(cpu, "_of_thread", threading.local())
    monkeypatch.setattr(cpu, "KEPT_BYTES", 0)


def assert_agrees(case, n, m, prune, rescale):
    dtype = case.grad_output.dtype
    result = PRUNED_INPUT_GRAD(*case.arguments(n, m, prune, rescale))
    pruned = reference.prune_nm(case.grad_output, SEED, n, m, prune, rescale)
    expected = case.input_grad(pruned)
    terms = case.replace(weight=case.weight.abs()).input_grad(pruned.abs())
    allowed = TOLERANCES[dtype].of_terms * terms + TOLERANCES[dtype].of_result * expected.abs()
    if dtype == torch.bfloat16 and prune == "rescaled_magnitude" and rescale != "group":
        # A factor that is off by a rounding may round a value to the next number.
        allowed += 2**-7 * terms
    assert result.shape == case.input_size
    assert result.dtype == dtype
    error = (result.double() - expected).abs()
    assert (error <= allowed).all(), (error / terms).max()


LAYERS = {
    "3x3": {"kernel": (3, 3), "size": (9, 7), "padding": 1},
    "3x3 of stride 2": {"kernel": (3, 3), "size": (9, 8), "padding": 1, "stride": 2},
    "1x1": {"kernel": (1, 1), "size": (6, 5)},
    "1x1 of stride 2": {"kernel": (1, 1), "size": (6, 5), "stride": 2},
    "a stride that skips inputs": {"kernel": (2, 1), "size": (8, 9), "stride": (3, 4)},
    "5x3 with padding and dilation": {
        "kernel": (5, 3),
        "size": (9, 9),
        "padding": (2, 3),
        "dilation": 2,
    },
    "dilation and stride": {
        "kernel": (3, 3),
        "size": (9, 9),
        "padding": 2,
        "dilation": (2, 3),
        "stride": 2,
    },
    "1d": {"kernel": (4,), "size": (37,), "padding": 2, "stride": 3},
    "3d": {"kernel": (2, 3, 1), "size": (4, 5, 3), "padding": (1, 1, 0), "stride": (1, 2, 1)},
    "transposed": {"kernel": (3, 3), "size": (5, 4), "padding": 1, "transposed": True},
    "transposed, of stride 2": {
        "kernel": (3, 4),
        "size": (5, 4),
        "padding": 1,
        "stride": 2,
        "transposed": True,
        "output_padding": (1, 0),
    },
    "transposed, 3d": {
        "kernel": (2, 2, 3),
        "size": (3, 2, 4),
        "stride": (2, 1, 3),
        "dilation": (1, 2, 1),
        "transposed": True,
    },
    "matrices": {"kernel": (), "size": (), "batch": 21},
    "matrices, transposed": {"kernel": (), "size": (), "batch": 21, "transposed": True},
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer, last, nan_filled_empty):
    for groups in (1, 2) if LAYERS[layer]["size"] else (1,):
        case = make_case(40 * groups, 96 * groups, groups=groups, **LAYERS[layer])
        if last:
            case.grad_output, case.weight = map(channels_last, (case.grad_output, case.weight))
        assert_agrees(case, 2, 4, "rescaled_magnitude", "group")


@pytest.mark.parametrize(
    "in_channels", [1, 7, 8, 9, 16, 24, 33, 40, 48, 56, 64, 72, 80, 88, 96, 203]
)
def test_every_number_of_input_channels(in_channels, nan_filled_empty):
    """All widths of blocks of input channels, whole vectors or not."""
    case = make_case(in_channels, 32, (3, 3), (5, 6), padding=1)
    assert_agrees(case, 2, 4, "magnitude", "group")


@pytest.mark.parametrize("out_channels", [32, 64, 96, 224, 288, 320])
def test_every_number_of_output_channels(out_channels, nan_filled_empty):
    """Whole blocks of output channels, and parts of one."""
    for m in (4, 32):
        for in_channels in (8, 64):
            case = make_case(in_channels, out_channels, (1, 3), (3, 6), padding=(0, 1))
            assert_agrees(case, 2, m, "magnitude", "group")


@pytest.mark.parametrize("out_channels", [16, 320])
@pytest.mark.parametrize("in_channels", [64, 192, 256, 260])
def test_sums_in_the_result(in_channels, out_channels, nan_filled_empty):
    """Of one tap or several, of one block of input channels or several, with holes and edges."""
    for kernel in ((1, 1), (3, 1)):
        for stride, padding, groups in ((1, 0, 1), (2, 0, 1), (1, 1, 1), (1, 0, 2)):
            case = make_case(
                *(in_channels * groups, out_channels * groups, kernel, (7, 6)),
                stride=stride,
                padding=padding,
                groups=groups,
            )
            case.grad_output = channels_last(case.grad_output)
            assert_agrees(case, 2, 16, "rescaled_magnitude", "group")


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(("prune", "rescale"), FUNCTIONS)
def test_every_setting(prune, rescale, m, dtype, nan_filled_empty):
    for n in sorted({1, min(2, m), m // 2 or 1, m}):
        case = make_case(12, 96, (3, 3), (7, 5), padding=1, dtype=dtype)
        assert_agrees(case, n, m, prune, rescale)


@given(st.data())
def test_any_layer_and_setting(data):
    n, m, prune, rescale = data.draw(strategies.settings())
    dtype = data.draw(st.sampled_from(cpu.DTYPES))
    kind = data.draw(st.sampled_from(["normal", "ties"]))
    assert_agrees(data.draw(cases(m, dtype, kind)), n, m, prune, rescale)


# What is kept


def by_identity(grad_output, n, m, prune, rescale, size):
    """Return the operator's result for weights that are identities of size channels."""
    channels, dims = grad_output.shape[1], grad_output.dim() - 2
    weight = torch.eye(size).repeat(channels // size, 1).view(channels, size, *[1] * dims)
    settings = ([1] * dims, [0] * dims, [1] * dims, False, channels // size)
    return PRUNED_INPUT_GRAD(
        grad_output, weight.to(grad_output.dtype), SEED, n, m, prune, rescale,
        grad_output.shape, *settings,
    )  # fmt: skip


def assert_keeps_the_values_of_the_reference(x, n, m, prune, rescale, size, in_pairs=False):
    result = by_identity(x, n, m, prune, rescale, size)
    pruned = reference.prune_nm(x, SEED, n, m, prune, rescale)
    if in_pairs:
        pruned = torch.where(pruned.abs() < torch.finfo(x.dtype).tiny, 0, pruned)
    # 0 times an infinity is NaN, so each result is one value, or NaN.
    groups = reference.channel_groups(pruned.float(), size)
    expected = (groups.unsqueeze(-1) * torch.eye(size)).sum(-2).flatten(-2).movedim(-1, 1)
    tolerance = {"rtol": 0, "atol": 0}
    if rescale != "group":
        tolerance = {key: getattr(reference.TOLERANCES[x.dtype], key) for key in tolerance}
    torch.testing.assert_close(result.float(), expected, equal_nan=True, **tolerance)
    assert ((result == 0) == (expected == 0)).all()


@given(st.data(), strategies.settings())
def test_keeps_the_values_of_the_reference(data, setting):
    n, m, prune, rescale = setting
    spatial = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    shape = (data.draw(st.integers(1, 3)), m * data.draw(st.integers(1, 4)), *spatial)
    kind = data.draw(st.sampled_from(["normal", "ties", "special"]))
    dtype = data.draw(st.sampled_from(cpu.DTYPES))
    x = strategies.values(shape, dtype, kind, data.draw(strategies.seeds))
    x = channels_last(x) if data.draw(st.booleans()) else data.draw(strategies.layouts(x))
    in_pairs = HAS_PAIRS and dtype == torch.bfloat16 and (n, m) == (2, 4)
    assert_keeps_the_values_of_the_reference(x, n, m, prune, rescale, m, in_pairs)


@given(st.data(), st.integers(1, 4), st.sampled_from(["magnitude", "rescaled_magnitude"]))
def test_keeps_the_values_of_the_reference_of_many_adjacent_channels(data, n, prune):
    """Groups of four that are packed position by position: whole vectors of them and parts."""
    size = 4 * data.draw(st.integers(16, 48))
    shape = (data.draw(st.integers(1, 2)), size * data.draw(st.integers(1, 2)), 3, 7)
    kind = data.draw(st.sampled_from(["normal", "ties", "special"]))
    dtype = data.draw(st.sampled_from(cpu.DTYPES))
    x = strategies.values(shape, dtype, kind, data.draw(strategies.seeds))
    # 0 times an infinity would hide what all other channels have.
    x = channels_last(torch.where(x.isfinite(), x, 1))[:, :, :, : data.draw(st.integers(1, 7))]
    in_pairs = HAS_PAIRS and dtype == torch.bfloat16 and n == 2
    assert_keeps_the_values_of_the_reference(x, n, 4, prune, "group", size, in_pairs)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("prune", ["magnitude", "rescaled_magnitude", "mvue"])
def test_what_is_not_finite_is_kept(prune, special):
    x = torch.randn(1, 8, 3, 3) * 1e30
    x[0, 5, 1, 1] = special
    result = by_identity(x, 1, 4, prune, "group", 4)
    assert not result[0, 4:, 1, 1].isfinite().all()
    result[0, 4:, 1, 1] = 0
    assert result.isfinite().all()


def test_what_is_finite_stays_finite():
    """A group whose L1 norm is the largest number: its scaled value may round beyond that."""
    most = torch.finfo(torch.float32).max
    kept = most * torch.linspace(0.51, 0.99, 4096)
    x = torch.stack([kept, kept - most, torch.zeros(4096), torch.zeros(4096)])[None]
    beyond = (x.abs().sum(1) / kept * kept).isinf()
    assert beyond.any()
    result = by_identity(x, 1, 4, "rescaled_magnitude", "group", 4)
    expected = reference.prune_nm(x, None, 1, 4, "rescaled_magnitude", "group")
    assert torch.equal(result, expected)
    assert (result[:, 0][beyond] == most).all()


def test_what_is_dropped_and_the_padding_are_not_multiplied():
    """0 times NaN of a weight is NaN in a dense product."""
    case = make_case(8, 8, (3, 3), (4, 4), padding=1)
    case.grad_output[:, ::4] = 10.0
    case.weight[1::4] = float("nan")
    pruned = case.arguments(1, 4, "magnitude")
    assert PRUNED_INPUT_GRAD(*pruned).isfinite().all()
    case.grad_output[:, 1] = 20.0
    assert PRUNED_INPUT_GRAD(*pruned).isnan().any()
    case.weight[:] = 1
    case.weight[:, :, 0] = float("nan")
    # The first row of the kernel reaches rows 0 to 2 of the input alone.
    result = PRUNED_INPUT_GRAD(*case.arguments(1, 4, "magnitude"))
    assert result[:, :, :3].isnan().all()
    assert result[:, :, 3].isfinite().all()


# Threads, and what is in memory


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("prune", "rescale"), FUNCTIONS)
def test_bits_do_not_depend_on_the_number_of_threads(prune, rescale, threads):
    """Few positions, or many of a sample, are shared; else three threads have their own samples."""
    small = make_case(40, 64, (3, 3), (17, 19), batch=6, padding=1, stride=2)
    medium = make_case(72, 96, (3, 3), (20, 16), batch=6, padding=1)
    large = make_case(136, 320, (3, 3), (30, 30), batch=6, padding=1)
    for case in (small, medium, large):
        case.grad_output = channels_last(case.grad_output)
        results = []
        for count in (1, 2, 3, 4):
            threads(count)
            results.append(PRUNED_INPUT_GRAD(*case.arguments(3, 8, prune, rescale)))
        assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("count", [1, 2])
def test_samples_that_do_not_fit_are_packed_in_turn(count, threads):
    """More than one chunk of the batch, the last one smaller."""
    threads(count)
    case = make_case(8, 64, (3, 3), (30, 30), batch=7, padding=1)
    packed_bytes = case.grad_output.numel() // 2 * 8
    assert packed_bytes > 2 * 2**19
    assert case.grad_output[0].numel() // 2 * 8 < 2**19  # So some samples are packed at once.
    assert_agrees(case, 2, 4, "random", "group")
    assert_agrees(case, 2, 4, "rescaled_magnitude", "channel")


def test_one_openmp_is_loaded():
    """In a process of its own: other packages bring theirs."""
    code = """
from sdgp_fx.kernels.sparse import cpu
assert not cpu.why_not_compiled()
files = {line.split()[-1] for line in open("/proc/self/maps")}
print(*(file for file in files if "libgomp" in file or "libomp" in file or "iomp" in file))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == 1, run.stdout


def test_gradients_of_any_strides_are_read_in_place():
    """Of more channels, those that are adjacent would be summed in another order."""
    case = make_case(8, 12, (3, 3), (6, 6), padding=1)
    x = case.grad_output
    expected = PRUNED_INPUT_GRAD(*case.arguments())
    gaps = torch.stack([x, x.new_full(x.shape, float("nan"))], -1)[..., 0]
    for other in (channels_last(x), gaps, x.mT.contiguous().mT):
        result = PRUNED_INPUT_GRAD(*case.replace(grad_output=other).arguments())
        assert torch.equal(result, expected)
    expanded = x[:1].expand(x.shape)
    result = PRUNED_INPUT_GRAD(*case.replace(grad_output=expanded).arguments())
    assert torch.equal(result, expected[:1].expand(result.shape))


# bfloat16 by pairs


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Return the product with the portable definition of what AVX512-BF16 computes."""
    source = tmp_path_factory.mktemp("pairs") / "emulated.cpp"
    text = cpp_prune.text_of(cpu.SOURCE)
    source.write_text("#define SDGP_EMULATE_PAIRS\n" + text)
    with mock.patch.object(cpu, "SOURCE", source), mock.patch.object(cpp_prune, "PRUNING", EMPTY):
        library, why = cpu._compiled.__wrapped__()
    assert not why
    return library


@pytest.fixture(params=["emulated", "by the instruction"] if HAS_PAIRS else ["emulated"])
def by_pairs(request, monkeypatch):
    """Multiply two of four bfloat16 by pairs, on any machine."""
    if request.param == "emulated":
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(cpu, "_compiled", lambda: (library, ""))


# The fixture does nothing that another example would have to undo.
few_examples = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_by_pairs(layer, last, by_pairs, nan_filled_empty):
    for groups in (1, 2) if LAYERS[layer]["size"] else (1,):
        sizes = {"groups": groups, "dtype": torch.bfloat16, **LAYERS[layer]}
        case = make_case(40 * groups, 100 * groups, **sizes)
        if last:
            case.grad_output, case.weight = map(channels_last, (case.grad_output, case.weight))
        assert_agrees(case, 2, 4, "rescaled_magnitude", "group")


@pytest.mark.parametrize("in_channels", [1, 7, 16, 17, 33, 64, 80, 96, 112, 128, 160, 203])
def test_every_number_of_channels_by_pairs(in_channels, by_pairs, nan_filled_empty):
    for out_channels in (4, 36, 96, 320):
        case = make_case(in_channels, out_channels, (3, 1), (5, 6), dtype=torch.bfloat16)
        case.weight = channels_last(case.weight)
        assert_agrees(case, 2, 4, "magnitude", "group")


@pytest.mark.parametrize(("prune", "rescale"), FUNCTIONS)
def test_every_function_by_pairs(prune, rescale, by_pairs, nan_filled_empty):
    case = make_case(12, 96, (3, 3), (7, 5), padding=1, dtype=torch.bfloat16)
    assert_agrees(case, 2, 4, prune, rescale)
    for n, m in ((1, 4), (2, 8)):  # Single values, in the same library.
        assert_agrees(case, n, m, prune, rescale)


@few_examples
@given(st.data())
def test_any_layer_by_pairs(by_pairs, data):
    kind = data.draw(st.sampled_from(["normal", "ties"]))
    case = data.draw(cases(4, torch.bfloat16, kind))
    assert_agrees(case, 2, 4, *data.draw(st.sampled_from(FUNCTIONS)))


@few_examples
@given(st.data())
def test_keeps_the_values_of_the_reference_by_pairs(by_pairs, data):
    spatial = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    shape = (data.draw(st.integers(1, 3)), 4 * data.draw(st.integers(1, 9)), *spatial)
    kind = data.draw(st.sampled_from(["normal", "ties", "special"]))
    prune, rescale = data.draw(st.sampled_from(FUNCTIONS))
    x = strategies.values(shape, torch.bfloat16, kind, data.draw(strategies.seeds))
    x = channels_last(x) if data.draw(st.booleans()) else x
    assert_keeps_the_values_of_the_reference(x, 2, 4, prune, rescale, 4, in_pairs=True)


def test_subnormal_numbers_are_zeros_by_pairs(by_pairs):
    """A value, a weight and a product: single values do without it."""
    tiny = torch.finfo(torch.bfloat16).tiny
    x = torch.tensor([tiny / 2, -1.0, 0.0, 0.0, tiny, -tiny, 0.0, 0.0]).bfloat16()[None, :, None]
    weight = torch.tensor([1.0, tiny / 2, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0]).bfloat16()[:, None, None]
    arguments = ("magnitude", "group", (1, 2, 1), [1], [0], [1], False, 2)
    pairs = PRUNED_INPUT_GRAD(x, weight, None, 2, 4, *arguments)
    assert pairs.flatten().tolist() == [0.0, 0.0]
    single = PRUNED_INPUT_GRAD(x, weight, None, 1, 4, *arguments)
    assert single.flatten().tolist() == [-tiny / 2, tiny / 2]


def test_bits_by_pairs_do_not_depend_on_the_number_of_threads(by_pairs, threads):
    for layer in (
        {"in_channels": 40, "out_channels": 64, "size": (17, 19), "stride": 2},
        {"in_channels": 136, "out_channels": 320, "size": (30, 30)},
    ):
        case = make_case(kernel=(3, 3), batch=5, padding=1, dtype=torch.bfloat16, **layer)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(PRUNED_INPUT_GRAD(*case.arguments(2, 4, "rescaled_magnitude")))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def innermost_loop(instructions, name):
    """Return the shortest loop of a function in assembly with an instruction of that name."""
    places, loops = {}, []
    for i, line in enumerate(instructions):
        places[line.rstrip(":")] = i
        operation, *target = line.split()
        if operation.startswith("j") and places.get(target[-1], i) < i:
            loops.append([s for s in instructions[places[target[-1]] : i + 1] if s[0] != "."])
    return min((loop for loop in loops if any(name in s for s in loop)), key=len)


def test_the_loop_of_pairs_multiplies_and_loads(tmp_path):
    """Of four slots: a load of their values, and of their places; each value is spread.

    Of a vector: a load, which may be an operand.
    """
    compiler = os.environ.get("CXX", "g++")
    # As for a machine that has the instruction. -O3 makes the same loops, and takes longer.
    command = [compiler, "-S", "-O2", "-std=c++17", "-fopenmp", "-march=cooperlake", "-o"]
    source, output = tmp_path / "empty.cpp", tmp_path / "product.s"
    source.touch()
    if shutil.which(compiler) is None or subprocess.run([*command, output, source]).returncode:
        pytest.skip("the compiler does not know the machine")
    source.write_text(cpp_prune.text_of(cpu.SOURCE))
    subprocess.run([*command, output, source], check=True)
    function = r"^\w*8multiplyILi(\d+)ELi(\d+)ELb1E\w*:$(.*?)\.cfi_endproc"
    found = re.findall(function, output.read_text(), re.MULTILINE | re.DOTALL)
    assert {int(vectors) for vectors, _, _ in found} == set(range(1, 9))
    for vectors, rows, text in found:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        loop = innermost_loop(lines, "vpermilps")
        products, spreads, fours = (
            sum(line.startswith(name) for line in loop)
            for name in ("vdpbf16ps", "vpermilps", "vbroadcastf32x4")
        )
        assert products == int(vectors) * spreads
        assert spreads == 4 * fours
        assert fours == int(rows)
        loads = [line for line in loop if re.match(r"vmov\w+\s+[^%]*\(.*\), %zmm", line)]
        assert sum("zmm" in line for line in loop) == products + spreads + fours + len(loads)
        assert len(loads) <= products
        places = [line for line in loop if re.match(r"movq\s+[^%]*\(.*\), %", line)]
        assert len(places) == fours
        assert len(loop) <= 2 * products + 16 * fours + 4


def test_a_thread_keeps_a_workspace(monkeypatch):
    monkeypatch.setattr(cpu, "KEPT_BYTES", 1000)
    first = cpu._workspace(600)
    assert cpu._workspace(200) is first
    assert cpu._workspace(800) is not first
    kept = cpu._workspace(1)
    assert len(kept) == 800
    assert len(cpu._workspace(2000)) == 2000
    assert cpu._workspace(1) is kept
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cpu._workspace, 1).result() is not kept


def test_what_the_last_call_left_is_not_read(monkeypatch):
    """Of a larger problem of another form: NaN in all places."""
    case = make_case(40, 96, **LAYERS["3x3 of stride 2"])
    expected = PRUNED_INPUT_GRAD(*case.arguments(2, 4, "magnitude", "group"))
    monkeypatch.setattr(cpu, "KEPT_BYTES", 1 << 25)
    cpu._workspace(1 << 22).fill_(255)
    result = PRUNED_INPUT_GRAD(*case.arguments(2, 4, "magnitude", "group"))
    assert torch.equal(result, expected)


# Compilation

COMPILE = """
from pathlib import Path
import torch
from sdgp_fx.kernels.sparse import cpu
print(repr(cpu.why_not_compiled()))
"""


def run_python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_may_compile_at_once(tmp_path):
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" long sdgp_workspace_bytes(const void*) { return 64; }')
    code = COMPILE.replace("print", f"cpu.SOURCE = Path({str(source)!r})\nprint", 1)
    cache = tmp_path / "cache"
    processes = [run_python(code, TORCHINDUCTOR_CACHE_DIR=str(cache)) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate()
        assert output.splitlines()[-1:] == ["''"], errors
    assert list(cache.rglob("*.so"))


def test_without_a_compiler_the_product_is_dense(tmp_path):
    code = (
        COMPILE
        + """
from tests.helpers.input_grads import make_case
from sdgp_fx.kernels.sparse.op import PRUNED_INPUT_GRAD
case = make_case(8, 8, (3,), (5,))
pruned = torch.ops.sdgp.prune_nm(case.grad_output, None, 2, 4, "magnitude", "group", 1)
result = PRUNED_INPUT_GRAD(*case.arguments(2, 4, "magnitude"))
torch.testing.assert_close(result, case.input_grad(pruned, torch.float32))
"""
    )
    process = run_python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX="/no/such/compiler")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.splitlines()[-1:] == ["'no C++ compiler'"]


def test_a_compiler_that_fails_is_told_apart(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\ncase $1 in --version) echo 'g++ 12';; *) exit 1;; esac\n")
    compiler.chmod(0o755)
    process = run_python(COMPILE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"), CXX=str(compiler))
    output, errors = process.communicate()
    assert output.splitlines()[-1:] == ["'the C++ compiler fails'"], errors
    assert "does not compile" in errors


def test_every_function_is_known_and_an_unknown_one_refused(monkeypatch):
    assert set(cpp_prune.FUNCTIONS) == set(PRUNING_FUNCTIONS)
    monkeypatch.setattr(cpp_prune, "FUNCTIONS", ("random",))
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 8, 1, 1)
    problem = Problem(
        *(x, weight, None, 2, 4, "magnitude", "group", x.shape),
        *([1, 1], [0, 0], [1, 1], False, 1),
    )
    with pytest.raises(ValueError, match="in C\\+\\+ have no pruning function 'magnitude'"):
        cpu.prepare(problem)
