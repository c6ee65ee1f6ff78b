"""Test the command that compiles products for a GPU that is elsewhere."""

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")

from benchmarks import compile_products
from sdgp_fx.kernels.sparse import binaries, store
from sdgp_fx.kernels.sparse.tensor_cores import Product, tiles
from sdgp_fx.measurement.workload import Workload


def test_products_of_a_network():
    """Strided layers, and those of too few channels, have none; 1x1 ones go by rows."""
    workload = Workload("resnet50", 2, 64, "float16", device=torch.device("cuda"))
    found = compile_products.products_of([workload, workload])
    assert len(set(found)) == len(found)
    assert {product.dtype for product in found} == {"float16"}
    assert Product("float16", 16, 16, 64, 64, (3, 3), (1, 1)) in found
    assert Product("float16", 1, 1, 2048, 512, (1, 1), (1, 1)) in found
    assert {product.kernel for product in found} == {(1, 1), (3, 3)}


@pytest.mark.parametrize("every_tile", [False, True])
def test_kernels_are_put_into_a_folder(every_tile, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "store")
    monkeypatch.setattr(binaries, "why_no_compiler", lambda: "")
    product = Product("bfloat16", 1, 1, 64, 128, (1, 1), (1, 1))
    monkeypatch.setattr(compile_products, "products_of", lambda workloads: [product])
    monkeypatch.setattr(
        binaries, "build", lambda *asked: store.write(binaries.path_of(*asked), repr(asked))
    )
    arguments = ["--architecture", "sm_80", "--out", str(tmp_path / "out")]
    assert compile_products.main(arguments + ["--every-tile"] * every_tile) == 0
    made = [path.read_text() for path in (tmp_path / "out").iterdir()]
    asked = tiles(product, "sm_80")[: None if every_tile else 1]
    assert set(made) == {repr((product, tile, "sm_80")) for tile in asked}
    assert f"{len(asked)} kernels for sm_80" in capsys.readouterr().out


def test_without_a_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(binaries, "why_no_compiler", lambda: "TileLang is not installed")
    with pytest.raises(SystemExit):
        compile_products.main(["--out", str(tmp_path)])
    assert "cannot compile here: TileLang is not installed" in capsys.readouterr().err
