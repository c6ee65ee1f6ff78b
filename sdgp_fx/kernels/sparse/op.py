"""The operator sdgp::pruned_input_grad: stub of the interface."""

from __future__ import annotations

import torch

from .. import reference

torch.library.define(
    "sdgp::pruned_input_grad",
    "(Tensor grad_output, Tensor weight, Tensor? seed, int n, int m, str prune, str rescale,"
    " SymInt[] input_size, int[] stride, int[] padding, int[] dilation, bool transposed,"
    " int groups) -> Tensor",
)


@torch.library.impl("sdgp::pruned_input_grad", "CompositeExplicitAutograd")
def _(
    grad_output,
    weight,
    seed,
    n,
    m,
    prune,
    rescale,
    input_size,
    stride,
    padding,
    dilation,
    transposed,
    groups,
):
    p = reference.prune_nm(grad_output, seed, n, m, prune, rescale)
    if grad_output.dim() == 2:
        return p @ weight
    x = grad_output.new_empty(tuple(input_size))
    if grad_output.dim() > 2 and grad_output.stride(1) == 1:
        x = x.to(memory_format=torch.channels_last)
    return torch.ops.aten.convolution_backward(
        p,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        transposed,
        [0] * len(stride),
        groups,
        [True, False, False],
    )[0]


@torch.library.register_fake("sdgp::pruned_input_grad")
def _(
    grad_output,
    weight,
    seed,
    n,
    m,
    prune,
    rescale,
    input_size,
    stride,
    padding,
    dilation,
    transposed,
    groups,
):
    x = grad_output.new_empty(tuple(input_size))
    if grad_output.dim() == 4 and grad_output.stride(1) == 1:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


PRUNED_INPUT_GRAD = torch.ops.sdgp.pruned_input_grad.default


def why_not_sparse(dtype: torch.dtype, device: torch.device) -> str:
    if device.type != "cpu":
        return "no sparse product for this device"
    if dtype not in (torch.float32, torch.bfloat16):
        return "dtype not supported by the sparse product"
    return ""
