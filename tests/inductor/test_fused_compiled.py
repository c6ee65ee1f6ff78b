"""Test the fused kernels of a ResNet-18 layer, compiled for sm_90 on any machine."""

import pytest

from ..conftest import compiled_apart

pytest.importorskip("triton", reason="needs Triton")


@pytest.fixture(scope="module")
def kernels():
    """Compile in a process of its own, because Triton may be interpreting in this one."""
    return compiled_apart("compile_fused")


def test_there_is_a_kernel_for_each_function_that_writes_two_gradients(kernels):
    assert {name.split()[0] for name in kernels} == {
        "magnitude",
        "rescaled_magnitude",
        "random",
        "mvue",
    }
    assert all(kernel["writes"] == 2 for kernel in kernels.values())


def test_accesses_are_8_or_16_bytes_wide(kernels):
    for name, kernel in kernels.items():
        assert set(kernel["loads"]) <= {8, 16}, name
        assert set(kernel["stores"]) <= {8, 16}, name


def test_a_group_stays_in_the_registers_of_its_thread(kernels):
    for name, kernel in kernels.items():
        assert (kernel["spills"], kernel["shared"], kernel["shuffles"]) == (0, 0, 0), name
