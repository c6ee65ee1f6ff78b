"""Test the roofline: one layer by hand, and the figures in the documentation."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs timm")

from benchmarks import roofline
from sdgp_fx.measurement.convolutions import Convolution

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
DENSE = Convolution(
    input=(2, 64, 8, 8),
    weight=(128, 64, 3, 3),
    output=(2, 128, 8, 8),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    transposed=False,
    output_padding=(0, 0),
    groups=1,
    needs_input_gradient=True,
)
# DENSE by hand: 2 * (2 * 128 * 8 * 8) * (64 * 9) operations, and the bytes of 16-bit values.
FLOPS, INPUT, WEIGHT, OUTPUT = 18_874_368, 16_384, 147_456, 32_768
PACKED = 2 * 128 * 10 * 10 * 2 * 9 // 16  # With a position of zeros on each side.


def with_(**changes):
    return Convolution(**{**vars(DENSE), **changes})


def test_a_layer_bound_by_its_operations():
    each = roofline.costs(DENSE, roofline.Rates(1e12, 1e12), speedup=2)
    assert each.forward == each.input_gradient == each.weight_gradient == FLOPS / 1e12
    product = FLOPS / 2 / 1e12
    assert each.pruned == pytest.approx(
        {
            "fused": product + 18_432e-12,  # 9/16 of OUTPUT written
            "with_zeros": product + 32_768e-12,
            "separate": product + 51_200e-12,  # OUTPUT read, 9/16 of it written
            "packed": product + (OUTPUT + PACKED) / 1e12,
        },
        rel=1e-12,
    )


def test_a_layer_bound_by_its_bytes():
    """Faster operations save nothing; a compressed operand does, and its prune costs it again."""
    dense = INPUT + WEIGHT + OUTPUT
    each = roofline.costs(DENSE, roofline.Rates(1e15, 1e12), speedup=2)
    assert each.dense == pytest.approx(3 * dense / 1e12, rel=1e-12)
    compressed = dense - OUTPUT * 7 // 16
    assert each.pruned == pytest.approx(
        {
            "fused": (compressed + 18_432) / 1e12,
            "with_zeros": (dense + OUTPUT) / 1e12,
            "separate": (compressed + 51_200) / 1e12,
            "packed": (INPUT + WEIGHT + PACKED + OUTPUT + PACKED) / 1e12,
        },
        rel=1e-12,
    )


def test_a_stride_longer_than_the_kernel_leaves_input_unread():
    convolution = with_(weight=(128, 64, 1, 1), output=(2, 128, 4, 4), stride=(2, 2))
    each = roofline.costs(convolution, roofline.Rates(1e18, 1e12), speedup=2)
    weight, output = 128 * 64 * 2, 2 * 128 * 16 * 2
    assert each.forward == each.weight_gradient == (INPUT // 4 + weight + output) / 1e12
    assert each.input_gradient == (INPUT + weight + output) / 1e12  # with zeros in between


@pytest.mark.parametrize(
    ("changes", "prunable"),
    [
        ({}, True),
        ({"needs_input_gradient": False}, False),
        ({"output": (2, 126, 8, 8), "weight": (126, 64, 3, 3)}, False),
        ({"groups": 64, "weight": (128, 1, 3, 3)}, False),
        ({"groups": 32, "weight": (128, 2, 3, 3)}, True),
    ],
)
def test_what_can_be_pruned(changes, prunable):
    each = roofline.costs(with_(**changes), roofline.Rates(1e12, 1e12), speedup=2)
    assert bool(each.pruned) == prunable
    assert (each.input_gradient > 0) == changes.get("needs_input_gradient", True)


def test_saved_where_it_pays_and_everywhere():
    """Sum one layer that gains, twice, and one that loses."""
    rates = roofline.Rates(1e14, 1e12)
    large = with_(input=(8, 64, 8, 8), output=(8, 128, 8, 8))
    small = with_(input=(2, 64, 1, 1), output=(2, 128, 1, 1), weight=(128, 64, 1, 1))
    gains, loses = (roofline.costs(convolution, rates, 8) for convolution in (large, small))
    gain, loss = (c.input_gradient - c.pruned["with_zeros"] for c in (gains, loses))
    assert gain > 0 > loss
    row = roofline.summary("x", {large: 2, small: 1}, "y", rates, 8)
    dense = 2 * gains.dense + loses.dense
    assert row["layers"] == 3
    assert row["dense_ms"] == pytest.approx(dense * 1e3)
    assert row["with_zeros"] == pytest.approx(2 * gain / dense)
    assert row["with_zeros_all"] == pytest.approx((2 * gain + loss) / dense)
    assert row["with_zeros_layers"] == 2


def test_what_is_not_covered_saves_nothing_packed():
    """The product has stride 1 alone."""
    rates = roofline.Rates(1e12, 1e12)
    strided = with_(output=(2, 128, 4, 4), stride=(2, 2))
    assert {*roofline.costs(strided, rates, 2).pruned} == {*roofline.PRUNES}
    row = roofline.summary("x", {strided: 1}, "y", rates, 2)
    assert row["separate"] > 0
    assert row["packed"] == row["packed_all"] == row["covered_layers"] == 0
    both = roofline.summary("x", {strided: 1, DENSE: 2}, "y", rates, 2)
    alone = roofline.costs(DENSE, rates, 2)
    saved = 2 * (alone.input_gradient - alone.pruned["packed"])
    assert both["packed"] * both["dense_ms"] == pytest.approx(1e3 * saved)
    assert both["covered_layers"] == both["packed_layers"] == 2


def test_the_figures_in_the_repository_are_what_it_counts():
    saved = json.loads((RESULTS / "roofline.json").read_text())
    tasks = roofline.BENCHMARK.tasks(torch.device("cpu"), saved["settings"])
    counted = [row for task in tasks for row in task.run()]
    assert counted == [pytest.approx(row) for row in saved["rows"]]
    # The roofline counts as many layers as sdgp prunes.
    pruned = {
        row["model"]: row["layers"]
        for row in json.loads((RESULTS / "traffic.json").read_text())["rows"]
    }
    assert {row["model"]: row["layers"] for row in saved["rows"]}.items() <= pruned.items()


def test_command(tmp_path, capsys):
    out = tmp_path / "out.json"
    tiny = ["--model", "test_resnet", "--batch", "4", "--size", "64", "--speedup", "1.5"]
    assert roofline.main([*tiny, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["gpu"], row["speedup"], row["layers"]) for row in rows] == [
        ("H100", 1.5, 14),
        ("H200", 1.5, 14),
    ]
    printed = capsys.readouterr().out
    assert "test_resnet on H200, sparse products 1.5 x as fast: at most " in printed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "resnet_none", "--model: expected a network of timm"),
        ("--speedup", "0", "--speedup: expected a number above 0"),
        ("--compute", "most", "--compute: expected a number above 0"),
    ],
)
def test_errors_are_of_one_line(capsys, option, value, message):
    with pytest.raises(SystemExit) as error:
        roofline.main([option, value])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_guide_has_these_figures():
    rows = json.loads((RESULTS / "roofline.json").read_text())["rows"]
    ways = (*roofline.PRUNES, roofline.PACKED)
    prunes = [name + which for name in ways for which in ("", "_all")]
    table = [
        [row["model"], row["gpu"], f"{row['speedup']:g} x", *(f"{row[p]:.1%}" for p in prunes)]
        for row in rows
    ]
    guide = (RESULTS.parents[1] / "docs" / "guide.md").read_text()
    assert "".join(f"| {' | '.join(cells)} |\n" for cells in table) in guide
