"""Test the warnings about patterns of include and exclude that match no layer."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdgp_fx import SDGPConfig
from sdgp_fx.passes.module_names import ModuleNames
from sdgp_fx.passes.rules import patterns_above_layers, unmatched_patterns


class Block(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.breaks = breaks
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv1(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.conv2(y)


class Network(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(breaks), Block(breaks))
        self.layer2 = nn.Sequential(Block(breaks))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.layer2(self.layer1(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Merged(nn.Module):
    """Multiply with the sum of the weights of two modules, as RepVGG does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return F.conv2d(self.a(x), self.a.weight + self.b.weight)


def warned(model, *inputs, **rules):
    """Compile a step; return for each pattern that is warned of its option and what is closest."""
    options = {"sdgp.inner": "aot_eager", **{f"sdgp.{key}": value for key, value in rules.items()}}
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(model, backend="sdgp", options=options)(*inputs).sum().backward()
    found = {}
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        if "matches no layer" in message:
            option, pattern, *close = re.fullmatch(
                r"sdgp\.(\w+): '(.*)' matches no layer(?:; close to it: '(.*?)'.*)?", message
            ).groups()
            assert pattern not in found
            found[pattern] = (option, *close)
    return found


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4)


NO_LAYER = {
    "steem": "stem",
    "layr1.*": "layer1.*",
    "*.conv3": "*.conv2",
    "layer1": "layer1.*",
    "layer1.0": "layer1.0.*",
    "norm": None,
    "zzzzzz": None,
}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_match_no_layer_warn(option, x):
    found = warned(Network(), x, **{option: ["layer2.*", *NO_LAYER]})
    assert found == {pattern: (option, close) for pattern, close in NO_LAYER.items()}


MATCHED = ["stem", "layer1.*", "layer1.0.conv1", "*.conv?", "head", "*", "layer[12].*"]


@pytest.mark.parametrize("breaks", [False, True])
def test_no_pattern_that_matches_a_layer_of_any_graph_warns(breaks, x):
    """With graph breaks each graph has some of the layers; and other targets don't count."""
    assert not warned(Network(breaks), x, include=MATCHED)
    assert not warned(
        Network(breaks), x, exclude=[pattern for pattern in MATCHED if pattern != "*"]
    )


def test_graph_breaks_hide_no_pattern_that_matches_nothing(x):
    assert warned(Network(breaks=True), x, exclude="layer3.*") == {
        "layer3.*": ("exclude", "layer2.*")
    }


def test_a_module_may_be_a_layer_by_a_product_of_its_own(x):
    network = nn.Sequential(nn.Conv2d(3, 8, 1), Merged())
    assert not warned(network, x, exclude="1")
    assert warned(nn.Sequential(nn.Conv2d(3, 8, 1), Block()), x, exclude="1") == {
        "1": ("exclude", "1.*")
    }


def test_what_is_not_known_yet_is_not_blamed_on_a_pattern(x):
    """A function may go on to another model after a graph break."""
    first, second = nn.Sequential(nn.Conv2d(3, 8, 1)), nn.ModuleDict({"late": nn.Conv2d(8, 8, 1)})

    def with_break(x):
        x = first(x)
        torch._dynamo.graph_break()
        return second["late"](x)

    def without(x):
        return second["late"](first(x))

    assert not warned(with_break, x, exclude="late")
    assert not warned(without, x, exclude="late")
    assert warned(without, x, exclude="lat") == {"lat": ("exclude", "late")}


def test_no_rules_no_warnings():
    names = ModuleNames(layers=("a",), others=("b",), is_complete=True)
    assert not unmatched_patterns(SDGPConfig(), names)
    assert not patterns_above_layers(SDGPConfig(), names, {"a", "b.c"})
    assert not unmatched_patterns(SDGPConfig(exclude="c"), ModuleNames(layers=("a",)))
