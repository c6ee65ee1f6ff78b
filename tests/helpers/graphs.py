"""Trace joint graphs as the compiler does, and run them node by node on real tensors."""

import operator

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sdgp_fx.kernels.op import PRUNE_NM
from sdgp_fx.passes.convolutions import CONVOLUTION_BACKWARD


def joint_graph(model, *inputs, decompositions=None):
    """Trace the joint graph of one training step of model, as the backend gets it."""
    joints = []

    def partition(joint, joint_inputs, **kwargs):
        joints.append(copy_graph(joint))
        return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)

    backend = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition,
        decompositions=decompositions or {},
    )
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    (joint,) = joints
    return joint


def copy_graph(gm):
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def random_inputs(gm):
    """Return a tensor for every placeholder, with its shape, strides and dtype."""
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        with unset_fake_temporarily():
            dense = torch.randn(tuple(value.shape), generator=generator, dtype=value.dtype)
            tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            tensors.append(tensor.copy_(dense))
    return tensors


def run(gm, inputs):
    """Return the values of all nodes by name."""
    values = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            values[node.name] = super().run_node(node)
            return values[node.name]

    Recorder(gm, garbage_collect_values=False).run(*inputs)
    return values


def gradients(gm, position=0):
    """Return the nodes of a convolution's input, weight and bias gradients; None if none.

    Convolutions are told apart by their inputs.

    Args:
        position: The index of the convolution in the graph.
    """
    outputs = {}
    for node in gm.graph.find_nodes(op="call_function", target=CONVOLUTION_BACKWARD):
        triple = outputs.setdefault(node.args[1], [None, None, None])
        for user in node.users:
            assert user.target is operator.getitem
            triple[user.args[1]] = user
    return list(outputs.values())[position]


def backward_of(gradient):
    """Return the convolution_backward node that a gradient comes from."""
    assert gradient.target is operator.getitem
    assert gradient.args[0].target is CONVOLUTION_BACKWARD
    return gradient.args[0]


def is_pruned(gradient):
    """Return whether a gradient is computed from a pruned grad_output."""
    return backward_of(gradient).args[0].target is PRUNE_NM
