"""Test the sparse products: they are those of a network, and they are right."""

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")

from benchmarks import sparse_mm
from sdgp_fx.measurement.workload import Workload

CUDA = torch.device("cuda")


def test_input_gradients_as_products():
    products = sparse_mm.input_gradients(Workload("resnet50", 256, 224))
    assert (256 * 56 * 56, 256, 64) in products
    assert (256 * 7 * 7, 2048, 1024) in products
    assert (256 * 7 * 7, 1024, 2048) not in products


@pytest.mark.gpu
def test_sparse_product_is_right(monkeypatch):
    (row,) = sparse_mm.measure(CUDA, (512, 256, 128), "bfloat16", 0.01)
    assert row["relative_error"] < 1e-2
