"""Test the packed format by hand, and that unpacking is the inverse of packing."""

import math

import pytest
import torch

from sdgp_fx.kernels import reference
from sdgp_fx.kernels.sparse.packed import can_pack, empty_packed, pack, unpack

from ...helpers.gradients import as_channels_last, special

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("group", "values", "places"),
    [
        ([0, 0, 0, 0], [0, 0], (0, 1)),
        ([5, 0, 0, 0], [5, 0], (0, 1)),
        ([0, 5, 0, 0], [0, 5], (0, 1)),
        ([0, 0, 5, 0], [0, 5], (0, 2)),
        ([0, 0, 0, 5], [0, 5], (0, 3)),
        ([5, 6, 0, 0], [5, 6], (0, 1)),
        ([5, 0, 6, 0], [5, 6], (0, 2)),
        ([5, 0, 0, 6], [5, 6], (0, 3)),
        ([0, 5, 6, 0], [5, 6], (1, 2)),
        ([0, 5, 0, 6], [5, 6], (1, 3)),
        ([0, 0, 5, 6], [5, 6], (2, 3)),
        ([0, NAN, 0, -INF], [NAN, -INF], (1, 3)),
        ([1e-40, 0, -1e-40, 0], [1e-40, -1e-40], (0, 2)),
        ([-0.0, 0, 7, -0.0], [0, 7], (0, 2)),
    ],
)
def test_a_group_by_hand(group, values, places):
    """Among others that are all zero, as the second and as the last of an int16."""
    for index in (1, 3):
        x = torch.zeros(1, 4, 4)
        x[0, index] = torch.tensor(group)
        packed = pack(x.view(1, 16), ())
        expected = torch.zeros(1, 4, 2)
        expected[0, index] = torch.tensor(values)
        # Positive zeros: equal in bits.
        assert torch.equal(packed.values.view(torch.int32), expected.view(1, 8).view(torch.int32))
        bits = 0x4444 & ~(0xF << 4 * index) | (places[0] | places[1] << 2) << 4 * index
        assert packed.places.item() & 0xFFFF == bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "halo"),
    [
        ((3, 32), ()),
        ((2, 16, 5), (2,)),
        ((2, 48, 3, 5), (1, 2)),
        ((1, 16, 2, 3, 4), (0, 2, 1)),
        ((0, 16, 3, 5), (1, 1)),
        ((2, 16, 0, 5), (1, 1)),
    ],
)
def test_round_trip(dtype, shape, halo, nan_filled_empty):
    seed = torch.tensor([5])
    pruned = reference.prune_nm(special(shape, dtype), seed, 2, 4, "random", "group")
    for layout in (torch.Tensor.contiguous, as_channels_last):
        packed = pack(layout(pruned), halo)
        padded = [size + 2 * width for size, width in zip(shape[2:], halo, strict=True)]
        assert packed.values.shape == (shape[0], *padded, shape[1] // 2)
        assert packed.places.shape == (shape[0], *padded, shape[1] // 16)
        assert (packed.values.dtype, packed.places.dtype) == (dtype, torch.int16)
        result = unpack(packed, halo)
        torch.testing.assert_close(result, pruned, rtol=0, atol=0, equal_nan=True)
        assert result.movedim(1, -1).is_contiguous()


def test_the_halo_keeps_nothing():
    x = torch.ones(2, 16, 3, 2)
    x[:, ::2] = 0
    packed = pack(x, (2, 1))
    outside = torch.ones(2, 7, 4, dtype=torch.bool)
    outside[:, 2:5, 1:3] = False
    assert (packed.values[outside] == 0).all()
    assert (packed.places[outside] == 0x4444).all()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (2, 8), (1, 16), (2, 32)])
def test_places_ascend(n, m):
    x = special((4, 64, 3, 5), torch.float32)
    packed = pack(reference.prune_nm(x, None, n, m, "magnitude", "group"), (1, 1))
    for shift in (0, 4, 8, 12):
        bits = packed.places >> shift
        assert ((bits & 3) < (bits >> 2 & 3)).all()


def test_which_patterns_pack():
    """Those of which every pruned gradient packs, so that none needs a look at its values."""
    for m in (1, 2, 4, 8, 16, 32):
        for n in range(1, m + 1):
            adjacent = torch.zeros(32 // m, m)
            adjacent[:, :n] = 1
            most = int(adjacent.view(8, 4).sum(1).max())
            assert can_pack(n, m) == (most <= 2), (n, m)


@pytest.mark.parametrize(
    ("shape", "halo", "named"),
    [((2, 24, 3), (1,), "gradient"), ((2, 16, 3), (), "halo"), ((2, 16, 3), (-1,), "halo")],
)
def test_arguments_that_do_not_fit(shape, halo, named):
    for function in (pack, empty_packed):
        with pytest.raises(ValueError, match=f"^{named}: expected"):
            function(torch.zeros(shape), halo)


def test_three_of_four_do_not_pack():
    x = torch.zeros(2, 16, 3)
    x[1, 4:8, 2] = torch.tensor([1, NAN, 0, 1])
    with pytest.raises(ValueError, match=r"^pruned: expected at most two"):
        pack(x, (1,))
