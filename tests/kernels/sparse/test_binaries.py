"""Test that compiled kernels are kept, found again, and found where nothing can be compiled."""

import pytest
import torch

from sdgp_fx.kernels.sparse import binaries, cuda, store
from sdgp_fx.kernels.sparse.binaries import Binary
from sdgp_fx.kernels.sparse.tensor_cores import ARCHITECTURES, Kernel, Product, Tile, tiles

PRODUCT = Product("bfloat16", 7, 7, 64, 128, (3, 3), (1, 1))
TILE = Tile(128, 64, 64, 3, 128)
KERNEL = Kernel(
    source="the source",
    entry="input_grad_kernel",
    arguments=("out", "weight_desc", "batch"),
    tile=TILE,
    threads=256,
    shared_bytes=52224,
    tensor_map=(9, 3, (96, 64, 9), (1728, 192), (32, 64, 1), (1, 1, 1), 0, 2, 2, 0),
)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What is compiled, which is always the same kernel."""
    pytest.importorskip("tilelang", reason="needs TileLang")
    from sdgp_fx.kernels.sparse import tilelang_kernel

    made = []
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "sdgp")
    monkeypatch.setattr(tilelang_kernel, "lower", lambda *asked: made.append(asked) or KERNEL)
    monkeypatch.setattr(tilelang_kernel, "compile_cubin", lambda *asked: b"\x00cubin\xff")
    monkeypatch.setattr(binaries, "why_no_compiler", lambda: "")
    return made


def test_a_kernel_is_compiled_once(compiled):
    asked = (PRODUCT, TILE, "sm_90")
    first = binaries.find(*asked)
    assert binaries.find(*asked) == first == Binary(KERNEL, b"\x00cubin\xff")
    assert hash(first)
    assert compiled == [asked]
    for other in (
        (PRODUCT._replace(width=8), TILE, "sm_90"),
        (PRODUCT, TILE._replace(stages=2), "sm_90"),
        (PRODUCT, TILE, "sm_80"),
    ):
        binaries.find(*other)
    assert len(compiled) == len(list(store.folder().iterdir())) == 4


def test_a_kernel_of_another_machine_is_found(compiled, monkeypatch):
    binaries.build(PRODUCT, TILE, "sm_90")
    monkeypatch.setattr(binaries, "why_no_compiler", lambda: "TileLang is not installed")
    assert binaries.find(PRODUCT, TILE, "sm_90").kernel == KERNEL
    assert binaries.find(PRODUCT, TILE, "sm_80") is None
    assert len(compiled) == 1


def test_what_does_not_compile_is_told_once(compiled, monkeypatch, caplog):
    from sdgp_fx.kernels.sparse import tilelang_kernel

    def fail(*asked):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(tilelang_kernel, "compile_cubin", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda._find.cache_clear()
    gpu = torch.device("cuda")
    whys = [cuda._why_no_kernel(PRODUCT, gpu) for _ in range(2)]
    assert whys == ["the sparse product does not compile"] * 2
    (record,) = caplog.records
    assert "no such instruction" in record.getMessage()
    cuda._find.cache_clear()


def test_other_texts_make_other_kernels(compiled, monkeypatch):
    before = binaries.path_of(PRODUCT, TILE, "sm_90")
    monkeypatch.setattr(store, "version", lambda: "of other texts")
    assert binaries.path_of(PRODUCT, TILE, "sm_90") != before


@pytest.mark.parametrize("architecture", ARCHITECTURES.values())
def test_tiles(architecture):
    for out_channels in (64, 128, 192):
        for in_channels in (32, 96, 128, 192):
            product = PRODUCT._replace(out_channels=out_channels, in_channels=in_channels)
            found = tiles(product, architecture)
            assert found
            for tile in found:
                assert out_channels % tile.depth == in_channels % tile.columns == 0
                # Each of the threads that multiply has a fragment of 16 x 8 at least.
                assert tile.rows * tile.columns >= 32 * tile.threads
