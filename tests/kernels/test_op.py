"""Test the operators sdgp::prune_nm and sdgp::channel_factor, and the function for users."""

import weakref
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sdgp_fx
from sdgp_fx.kernels import op, reference

from ..helpers.frames import deepest

FUNCTIONS = ["random", "magnitude", "rescaled_magnitude", "mvue"]
SEED = torch.tensor([42])


def prune_nm(x, n=2, m=4, prune="magnitude", rescale="group", groups=1, seed=SEED):
    return torch.ops.sdgp.prune_nm(x, seed, n, m, prune, rescale, groups)


def layouts(shape):
    """Yield the same numbers contiguous, channels last, transposed, with gaps, and expanded."""
    x = torch.randn(shape)
    yield "contiguous", x
    yield "channels_last", x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield "batch_inside", x.movedim(0, -1).contiguous().movedim(-1, 0)
    yield "gaps", torch.stack([x, x], -1)[..., 0]
    yield "expanded", x[:1].expand(shape)


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 8, 3, 5), (2, 8, 2, 3, 2)])
@pytest.mark.parametrize("prune", FUNCTIONS)
def test_opcheck(shape, prune):
    for _, x in layouts(shape):
        torch.library.opcheck(torch.ops.sdgp.prune_nm, (x, SEED, 2, 4, prune, "group", 2))


@pytest.mark.parametrize("rescale", ["feature_map", "channel"])
def test_opcheck_of_the_wider_scopes(rescale):
    for _, x in layouts((2, 8, 3, 5)):
        arguments = (x, None, 2, 4, "rescaled_magnitude", rescale, 1)
        torch.library.opcheck(torch.ops.sdgp.prune_nm, arguments)


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 8, 3, 5), (2, 8, 2, 3, 2)])
def test_result_does_not_depend_on_the_layout(shape, nan_filled_empty):
    for name, x in layouts(shape):
        expected = prune_nm(x.contiguous(), prune="rescaled_magnitude")
        pruned = prune_nm(x, prune="rescaled_magnitude")
        assert torch.equal(pruned, expected), name
        assert pruned.stride() == torch.empty_like(x).stride(), name


def test_dense_strides_are_kept():
    for name, x in layouts((2, 8, 3, 5)):
        if name in ("contiguous", "channels_last", "batch_inside"):
            assert prune_nm(x).stride() == x.stride()


def test_fake_has_the_shape_dtype_and_strides_of_the_real_thing():
    for _, x in layouts((2, 8, 3, 5)):
        with FakeTensorMode() as mode:
            fake = prune_nm(mode.from_tensor(x).bfloat16(), seed=None)
        real = prune_nm(x.bfloat16())
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("shape", [(0, 8, 3, 5), (2, 8, 0, 5), (2, 0, 3, 5)])
@pytest.mark.parametrize("prune", FUNCTIONS)
def test_zero_sized(shape, prune):
    assert prune_nm(torch.empty(shape), prune=prune).shape == shape


@pytest.mark.parametrize("prune", FUNCTIONS)
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32])
def test_n_equal_m_returns_a_copy_of_the_values(prune, m):
    x = torch.randn(2, 32, 3)
    pruned = prune_nm(x, m, m, prune)
    assert torch.equal(pruned, x)
    assert pruned.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("prune", FUNCTIONS)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (3, 4), (2, 8), (5, 16), (16, 32)])
def test_at_most_n_of_m_in_every_dtype(dtype, prune, n, m):
    x = torch.randn(2, 32, 3, 3).to(dtype)
    pruned = prune_nm(x, n, m, prune)
    assert pruned.dtype == dtype
    kept = (pruned != 0).unflatten(1, (32 // m, m)).sum(2)
    assert (kept == n).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 5}, "n: expected 1 <= n <= m = 4, got 5"),
        ({"m": 3}, "m: expected a power of two from 1 to 32, got 3"),
        ({"prune": "best"}, "prune: expected one of"),
        ({"rescale": "layer"}, "rescale: expected one of"),
        ({"groups": 4}, "groups: expected .* a multiple of m = 4 .* 4 groups of 8 channels"),
        ({"groups": 0}, "groups: expected"),
        ({"prune": "mvue", "seed": None}, "seed: expected one int64 .* got None"),
        ({"prune": "random", "seed": torch.tensor([1, 2])}, r"seed: expected one int64 .* \(2,\)"),
        ({"prune": "random", "seed": torch.tensor([1.0])}, "seed: .* torch.float32"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    x = torch.randn(2, 8, 3, 3)
    with pytest.raises(ValueError, match=words):
        prune_nm(x, **arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ValueError, match=words):
        prune_nm(mode.from_tensor(x), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calls_of_one_form(dtype):
    """Checked and prepared once, they have their own values and seeds, and keep neither."""
    for number in (1, 2):
        x, seed = torch.randn(2, 8, 7, dtype=dtype), torch.tensor([number])
        expected = reference.prune_nm(x, seed, 2, 4, "random", "group")
        assert torch.equal(prune_nm(x, prune="random", seed=seed), expected)
    kept = weakref.ref(x)
    del x
    assert kept() is None
    with pytest.raises(ValueError, match="seed: expected one int64"):
        prune_nm(torch.randn(2, 8, 7, dtype=dtype), prune="random", seed=None)


def test_a_call_goes_through_few_frames():
    """The operator's own call, the kernel, and what was prepared; see the kernel's comment."""
    x = torch.randn(2, 8, 7)
    assert deepest(lambda: prune_nm(x)) > 4
    function = torch.ops.sdgp.prune_nm.default
    assert deepest(lambda: function(x, SEED, 2, 4, "magnitude", "group", 1)) <= 4


def test_forms_of_gradients_without_end():
    for length in range(1, 40):
        with mock.patch.object(op, "MOST_PREPARED", 8):
            assert prune_nm(torch.randn(1, 8, length)).shape == (1, 8, length)
    assert len(op._prepared) <= 8


def test_bad_gradients_are_refused():
    with pytest.raises(ValueError, match=r"grad_output: expected float32.* got torch.int64 on cpu"):
        prune_nm(torch.ones(1, 4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"grad_output: expected \(N, C, \*spatial\), got 1"):
        prune_nm(torch.ones(4))
    with pytest.raises(ValueError, match=r"torch\.float64 on cuda"), FakeTensorMode():
        prune_nm(torch.ones(1, 4, 2, dtype=torch.float64, device="cuda"), seed=None)


# channel_factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 3, 5), (2, 8, 2, 3, 2)])
def test_channel_factor_opcheck(shape, dtype):
    for _, x in layouts(shape):
        torch.library.opcheck(torch.ops.sdgp.channel_factor, (x.to(dtype), 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (5, 16)])
def test_channel_factor_is_what_the_kept_values_are_multiplied_by(n, m, dtype):
    x = torch.randn(3, 32, 5, 7, dtype=dtype)
    factor = op.channel_factor(x, n, m)
    assert (factor.dtype, factor.shape) == (dtype, (32,))
    expected = prune_nm(x, n, m, "rescaled_magnitude", "channel")
    rtol = reference.TOLERANCES[dtype].rtol if dtype == torch.float32 else 0
    scaled = prune_nm(x, n, m) * factor.view(-1, 1, 1)
    torch.testing.assert_close(scaled, expected, rtol=rtol, atol=0)
    assert (factor > 1).all()


def test_channel_factor_is_one_where_it_would_not_be_finite():
    x = torch.randn(2, 4, 3)
    x[:, :2] *= 100  # Channels 2 and 3 keep nothing.
    x[1, 1, 2] = float("nan")
    factor = op.channel_factor(x, 1, 4)
    assert factor[1:].tolist() == [1.0, 1.0, 1.0]
    assert factor[0] > 1
    assert op.channel_factor(torch.empty(0, 4, 3), 2, 4).tolist() == [1.0] * 4


def test_channel_factor_refuses_bad_arguments():
    refused = [
        ((torch.randn(2, 8, 3), 5, 4), "n: expected 1 <= n <= m = 4, got 5"),
        ((torch.randn(2, 8, 3), 2, 3), "m: expected a power of two from 1 to 32, got 3"),
        ((torch.randn(2, 6, 3), 2, 4), "a multiple of m = 4 .* 6 channels"),
        ((torch.randn(8), 2, 4), r"grad_output: expected \(N, C, \*spatial\), got 1"),
        ((torch.ones(2, 8, 3, dtype=torch.int64), 2, 4), "grad_output: expected float32"),
    ]
    for (x, n, m), words in refused:
        with pytest.raises(ValueError, match=words):
            op.channel_factor(x, n, m)
        with FakeTensorMode() as mode, pytest.raises(ValueError, match=words):
            op.channel_factor(mode.from_tensor(x), n, m)


# The function for users


def test_public_function_is_the_operator():
    x = torch.randn(2, 8, 3, 3)
    expected = reference.prune_nm(x, None, 1, 4, "rescaled_magnitude", "channel")
    pruned = sdgp_fx.prune(x, 1, 4, rescale="channel")
    rtol = reference.TOLERANCES[x.dtype].rtol
    torch.testing.assert_close(pruned, expected, rtol=rtol, atol=0)
    with pytest.raises(ValueError, match="prune: expected one of"):
        sdgp_fx.prune(x, prune="best")


def test_a_derivative_is_refused():
    x = torch.randn(2, 8, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="sdgp::prune_nm has no derivative"):
        prune_nm(x)
    with pytest.raises(RuntimeError, match="sdgp::prune_nm has no derivative"):
        sdgp_fx.prune(x).sum().backward()
    assert torch.equal(sdgp_fx.prune(x), sdgp_fx.prune(x.detach()))
    assert not sdgp_fx.prune(x.detach()).requires_grad
    with torch.no_grad():
        sdgp_fx.prune(x)
    compiled = torch.compile(lambda x: sdgp_fx.prune(x).sum(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="has no derivative"):
        compiled(x).backward()


@pytest.mark.parametrize("prune", ["random", "mvue"])
def test_public_function_follows_manual_seed(prune):
    x = torch.randn(2, 8, 9, 9)
    torch.manual_seed(7)
    first, second = sdgp_fx.prune(x, prune=prune), sdgp_fx.prune(x, prune=prune)
    torch.manual_seed(7)
    assert torch.equal(sdgp_fx.prune(x, prune=prune), first)
    assert not torch.equal(first, second)


def test_the_others_leave_the_random_state_alone():
    state = torch.get_rng_state()
    sdgp_fx.prune(torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.parametrize("prune", FUNCTIONS)
def test_opcheck_on_the_gpu(prune):
    for _, x in layouts((2, 8, 3, 5)):
        arguments = (x.cuda(), SEED.cuda(), 2, 4, prune, "group", 1)
        torch.library.opcheck(torch.ops.sdgp.prune_nm, arguments)


@pytest.mark.gpu
def test_channel_factor_opcheck_on_the_gpu():
    for _, x in layouts((2, 8, 3, 5)):
        torch.library.opcheck(torch.ops.sdgp.channel_factor, (x.cuda(), 2, 4))
