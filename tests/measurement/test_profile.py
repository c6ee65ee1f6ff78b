"""Test the estimate of profiles."""

import pytest

from sdgp_fx.measurement import profile
from sdgp_fx.measurement.convolutions import PRODUCTS


def layer(input_gradient, largest_m, others=10.0):
    row = {f"{product}_ms": others for product in PRODUCTS}
    return {**row, "input_gradient_ms": input_gradient, "largest_m": largest_m}


def test_the_estimate():
    """By hand, n/m of the input gradients that can be pruned in groups of m are left."""
    layers = [layer(0.0, 1), layer(20.0, 4), layer(40.0, 32)]
    assert profile.totals_ms(layers)["input_gradient"] == 60
    rows = profile.estimate(
        layers, {"stock": {"ms": 500.0}, "2:4": {"ms": 510.0}}, [(2, 4), (1, 8)]
    )
    first, second = rows
    assert first["convolutions_ms"] == pytest.approx(120 - 30)
    assert first["share"] == pytest.approx(90 / 120)
    assert (first["step_ms"], first["measured_step_ms"]) == (pytest.approx(470), 510)
    assert second["convolutions_ms"] == pytest.approx(120 - 35)
    assert second["measured_step_ms"] is None
    assert profile.estimate(layers, {}, [(2, 4)])[0]["step_ms"] is None
