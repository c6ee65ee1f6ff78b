"""Test the kernels compiled for sm_80 and sm_90, on any machine: widths of accesses, no spills."""

import pytest

from ..conftest import compiled_apart

pytest.importorskip("triton", reason="needs Triton")


@pytest.fixture(scope="module")
def kernels():
    """Compile in a process of its own, because Triton may be interpreting in this one."""
    return compiled_apart("compile_kernels")


def select(kernels, *words):
    """Return the kernels, by name, whose names have all of words; there must be some."""
    chosen = {name: kernel for name, kernel in kernels.items() if set(words) <= set(name.split())}
    assert chosen
    return chosen


def test_nothing_spills(kernels):
    assert {name: kernel["spills"] for name, kernel in kernels.items() if kernel["spills"]} == {}


@pytest.mark.parametrize("prune", ["random", "magnitude", "rescaled_magnitude", "mvue"])
@pytest.mark.parametrize("sm", ["sm_80", "sm_90"])
def test_channels_last_bfloat16_moves_16_bytes_an_access(kernels, sm, prune):
    (kernel,) = select(kernels, sm, "channels_last", "bf16", "2:4", prune, "group").values()
    gradient_loads = [width for width in kernel["loads"] if width != 8]  # The seed has 8 bytes.
    assert set(gradient_loads) == {16}
    assert set(kernel["stores"]) == {16}
    # The seed is the only other load, and only where numbers are drawn.
    assert kernel["loads"].count(8) == (prune in ("random", "mvue"))


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_each_value_is_read_and_written_once(kernels, layout):
    """A tile takes 16 or 32 bytes a thread, in 16-byte accesses, and as many stores as loads."""
    chosen = select(kernels, layout, "bf16", "2:4", "magnitude")
    assert len(chosen) == 2
    for kernel in chosen.values():
        assert set(kernel["loads"]) == {16}
        assert len(kernel["stores"]) == len(kernel["loads"])


def test_a_group_of_four_stays_in_its_threads_registers(kernels):
    for prune in ("magnitude", "rescaled_magnitude"):
        for name, kernel in select(kernels, "2:4", prune, "group").items():
            assert kernel["shared"] == 0, name


def test_other_dtypes_and_patterns_move_16_bytes_too(kernels):
    for words in (("fp32", "2:4"), ("fp16", "2:4"), ("bf16", "4:8"), ("fp32", "16:32")):
        for kernel in select(kernels, "channels_last", "rescaled_magnitude", *words).values():
            assert set(kernel["loads"]) == set(kernel["stores"]) == {16}


def test_wider_scopes_read_the_gradient_in_16_bytes(kernels):
    for name in ("_prune_kernel", "_feature_map_kernel", "_channel_sums_kernel"):
        scope = "feature_map" if name == "_feature_map_kernel" else "channel"
        for kernel in select(kernels, "channels_last", "bf16", scope, name).values():
            assert set(kernel["loads"]) == {16}


@pytest.mark.parametrize("sizes", ["odd", "wide", "position"])
def test_sizes_that_triton_compiles_for_apart_compile_too(kernels, sizes):
    """The interpreter makes no difference between these sizes, but the compiler does."""
    assert len(select(kernels, sizes)) == 3


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_launchers_pass_what_the_kernels_take(kernels, layout):
    """Scopes "group" and "feature_map" take one launch, "channel" two."""
    launched = select(kernels, "launched", layout)
    assert sorted(name.partition("2:4 ")[2] for name in launched) == [
        "magnitude group _prune_kernel",
        "mvue group _prune_kernel",
        "random group _prune_kernel",
        "rescaled_magnitude channel _channel_sums_kernel",
        "rescaled_magnitude channel _prune_kernel",
        "rescaled_magnitude feature_map _feature_map_kernel",
        "rescaled_magnitude group _prune_kernel",
    ]
    for name, kernel in launched.items():
        if "_prune_kernel" in name and "channel _" not in name:
            assert set(kernel["loads"]) <= {16, 8}, name  # The seed has 8 bytes.
            assert set(kernel["stores"]) == {16}, name


def test_packing_moves_16_bytes_an_access(kernels):
    """A thread reads its run and writes half of it in 16 bytes an access, and its places in one."""
    chosen = select(kernels, "packed", "2:4")
    assert len(chosen) == 4
    for name, kernel in chosen.items():
        assert kernel["loads"] == [16, 16] + [8] * ("random" in name), name  # The seed has 8 bytes.
        assert kernel["stores"] == [16, 2], name
        assert kernel["shared"] == 0, name


def test_packing_moves_16_bytes_an_access_of_the_longest_groups(kernels):
    (kernel,) = select(kernels, "packed", "2:32").values()
    assert kernel["loads"] == [16] * 4
    assert kernel["stores"] == [16, 16, 4]
