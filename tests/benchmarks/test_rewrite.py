"""Test the check of rewritten joint graphs, on correct graphs and on graphs broken on purpose."""

import operator

import pytest
import torch
from torch import nn

from benchmarks.harness.rewrite import Original
from sdgp_fx import SDGPConfig
from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD
from sdgp_fx.passes.linears import MM
from sdgp_fx.passes.prune_input_grads import prune_input_grads

from ..helpers.graphs import joint_graph

CONFIG = SDGPConfig(targets="conv,linear")
aten = torch.ops.aten


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.body = nn.Linear(8, 8)
        self.drop = nn.Dropout()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.grouped(self.stem(x).relu()).mean((2, 3))
        return self.head(self.drop(self.body(x).relu()))


class ColumnMajor(nn.Linear):
    def forward(self, x):
        return super().forward(x.T)


def rewritten(model=None, x=None):
    """Return a rewritten graph, its original, and the decisions."""
    graph = joint_graph(model or Network(), torch.randn(2, 3, 8, 8) if x is None else x).graph
    original = Original(graph)
    return graph, original, prune_input_grads(graph, CONFIG)


def prune_of(graph, reader):
    """Return a prune and its product, a node that calls reader."""
    for prune in graph.find_nodes(op="call_function", target=PRUNE_NM):
        for user in prune.users:
            if user.target is reader:
                return prune, user
    raise AssertionError(reader)


def test_what_the_pass_does_is_right():
    graph, original, decisions = rewritten()
    result = original.check(graph, decisions, CONFIG)
    assert result.violations == []
    # All but those of the head's weight and bias come after its pruned gradient.
    assert (result.gradients, result.identical) == (8, 2)


def test_a_transposed_product_is_right():
    x = torch.randn(8, 6, requires_grad=True)
    graph, original, decisions = rewritten(ColumnMajor(8, 16), x)
    prune_of(graph, aten.permute.default)
    result = original.check(graph, decisions, CONFIG)
    assert result == ([], 3, 2)


def test_a_graph_that_is_left_alone_is_right():
    graph = joint_graph(Network(), torch.randn(2, 3, 8, 8)).graph
    assert Original(graph).check(graph, [], CONFIG) == ([], 8, 8)


def feed_weight_half(graph):
    prune, _ = prune_of(graph, CONVOLUTION_BACKWARD)
    (half,) = [user for user in prune.args[0].users if user.target is CONVOLUTION_BACKWARD]
    half.update_arg(0, prune)
    prune.append(half)
    return "is read by"


def feed_whole(graph):
    _, half = prune_of(graph, CONVOLUTION_BACKWARD)
    half.update_arg(10, [True, True, True])
    return "is read by"


def feed_weight_gradient_of_linear(graph):
    prune, _ = prune_of(graph, MM)
    (transpose,) = [user for user in prune.args[0].users if user.target is aten.t.default]
    transpose.update_arg(0, prune)
    return "is read by"


def feed_bias_gradient(graph):
    prune, _ = prune_of(graph, MM)
    (total,) = [user for user in prune.args[0].users if user.target is aten.sum.dim_IntList]
    total.update_arg(0, prune)
    return "is read by"


def feed_weight(graph):
    prune, half = prune_of(graph, CONVOLUTION_BACKWARD)
    half.update_arg(2, prune)
    return "is read by"


def prune_an_activation(graph):
    relu = next(iter(graph.find_nodes(op="call_function", target=aten.relu.default)))
    reader = next(iter(relu.users))
    with graph.inserting_before(reader):
        prune = graph.call_function(PRUNE_NM, (relu, None, 2, 4, CONFIG.prune, CONFIG.rescale, 1))
    reader.replace_input_with(relu, prune)
    return "prunes what is no gradient"


def prune_twice(graph):
    prune, product = prune_of(graph, MM)
    with graph.inserting_before(product):
        twice = graph.call_function(PRUNE_NM, (prune, *prune.args[1:]))
    product.update_arg(0, twice)
    return "is read by %prune_nm"


def skip_a_prune(graph):
    prune, product = prune_of(graph, MM)
    product.update_arg(0, prune.args[0])
    graph.erase_node(prune)
    return "prunes where"


def keep_other_values(graph):
    prune, _ = prune_of(graph, MM)
    prune.update_arg(2, 1)
    return "has settings"


def forget_groups(graph):
    for prune in graph.find_nodes(op="call_function", target=PRUNE_NM):
        prune.update_arg(6, 1)
    return "is read by"


def compute_with_another_weight(graph):
    _, half = prune_of(graph, CONVOLUTION_BACKWARD)
    half.update_arg(2, half.args[1])
    return "computed in another way"


def draw_dropout_again(graph):
    (drop,) = [n for n in graph.nodes if n.target is aten.native_dropout.default]
    with graph.inserting_after(drop):
        again = graph.call_function(drop.target, drop.args)
    (mask,) = [n for n in drop.users if n.target is operator.getitem and n.args[1] == 1]
    mask.update_arg(0, again)
    return "computed in another way"


def return_less(graph):
    output = graph.output_node()
    output.args = (output.args[0][:-2],)
    return "computed in another way"


@pytest.mark.parametrize(
    "break_",
    [
        feed_weight_half,
        feed_whole,
        feed_weight_gradient_of_linear,
        feed_bias_gradient,
        feed_weight,
        prune_an_activation,
        prune_twice,
        skip_a_prune,
        keep_other_values,
        forget_groups,
        compute_with_another_weight,
        draw_dropout_again,
        return_less,
    ],
    ids=lambda break_: break_.__name__,
)
def test_is_seen(break_):
    graph, original, decisions = rewritten()
    message = break_(graph)
    result = original.check(graph, decisions, CONFIG)
    assert any(message in violation for violation in result.violations), result.violations
