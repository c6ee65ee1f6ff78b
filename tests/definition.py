"""SDGP as its definition, in eager mode: what compiled networks are held against in the tests."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sdgp_fx.kernels import reference


def prune(dense, groups):
    """2:4, rescaled magnitude, where the channels can be pruned."""
    channels = dense.shape[1] // groups
    if channels == 1 or channels % 4:
        return dense
    return reference.prune_nm(dense, None, 2, 4, "rescaled_magnitude", "group")


class PrunedConv2d(torch.autograd.Function):
    """conv2d_input of the pruned gradient, all else dense."""

    @staticmethod
    def forward(ctx, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        ctx.save_for_backward(x, weight)
        ctx.rest = (stride, padding, dilation, groups)
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, *ctx.rest)

    @staticmethod
    def backward(ctx, dense):
        x, weight = ctx.saved_tensors
        pruned = prune(dense, ctx.rest[-1])
        gx = torch.nn.grad.conv2d_input(x.shape, weight, pruned, *ctx.rest)
        gw = torch.nn.grad.conv2d_weight(x, weight.shape, dense, *ctx.rest)
        return gx, gw, dense.sum((0, 2, 3)) if ctx.has_bias else None, None, None, None, None


class PrunedLinear(torch.autograd.Function):
    """The input gradient of the pruned gradient, all else dense."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dense):
        x, weight = ctx.saved_tensors
        rows = dense.flatten(0, -2)
        gx = (prune(rows, 1) @ weight).reshape(x.shape)
        return gx, rows.T @ x.flatten(0, -2), rows.sum(0) if ctx.has_bias else None


class EagerSDGP(TorchFunctionMode):
    """Every conv2d of an eager forward pass becomes a PrunedConv2d, every linear a PrunedLinear."""

    def __init__(self, targets="conv"):
        self.targets = targets.split(",")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "conv" in self.targets and function in (F.conv2d, torch.conv2d):
            pruned = PrunedConv2d.apply
        elif "linear" in self.targets and function is F.linear:
            pruned = PrunedLinear.apply
        else:
            return function(*args, **(kwargs or {}))
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            args = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args]
        with torch._C.DisableTorchFunction():
            return pruned(*args)


def eager_sdgp(model, targets="conv"):
    def forward(*args):
        with EagerSDGP(targets):
            return model(*args)

    return forward
