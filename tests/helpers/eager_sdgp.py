"""Run SDGP in eager mode, without the pass, to compare compiled networks with it."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import sdgp_fx

CONVOLUTIONS = {
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
}


class Pruned(torch.autograd.Function):
    """Compute the input gradient from the pruned gradient, and all else from the dense one."""

    @staticmethod
    def forward(ctx, layer, prune, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        ctx.layer, ctx.prune = layer, prune
        return layer(x, weight, bias)

    @staticmethod
    def backward(ctx, dense):
        operands = [t if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        x, *parameters = operands
        parameters = [p for p in parameters if p is not None]
        with torch.enable_grad():
            output = ctx.layer(*operands)
        gradients = torch.autograd.grad(output, parameters, dense, retain_graph=True)
        gx = None
        if ctx.needs_input_grad[2]:
            (gx,) = torch.autograd.grad(output, x, ctx.prune(dense))
        gw, gb = (*gradients, None)[:2]
        return None, None, gx, gw, gb


class EagerSDGP(TorchFunctionMode):
    """Replace every convolution, linear layer or both by a Pruned one in a forward pass.

    Args:
        only: The weights of the layers to replace; None for all.
        pruning: n, m, prune and rescale. The functions that draw numbers draw for one layer after
            the other in the order of the backward.
    """

    def __init__(self, targets, only=None, **pruning):
        self.targets = targets.split(",")
        self.only = only
        self.pruning = {"n": 2, "m": 4, **pruning}

    def prune(self, dense, kind, groups):
        """Prune where the channels allow it; the positions of a linear layer are spatial."""
        channels = dense.shape[-1 if kind == "linear" else 1] // groups
        depthwise = kind == "conv" and channels == 1
        if depthwise or channels % self.pruning["m"] or self.pruning["n"] == self.pruning["m"]:
            return dense
        if kind == "linear":
            return sdgp_fx.prune(dense.movedim(-1, 1), **self.pruning).movedim(1, -1)
        return sdgp_fx.prune(dense, **self.pruning, groups=groups)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kind = "linear" if function is F.linear else "conv" if function in CONVOLUTIONS else ""
        if kind in self.targets and self.selects(args[1]):
            return self.prunable(function, kind, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def selects(self, weight):
        return self.only is None or any(weight is other for other in self.only)

    def prunable(self, function, kind, x, weight, bias=None, *rest, **named):
        groups = rest[3] if len(rest) > 3 else named.get("groups", 1)
        operands = [x, weight, bias]
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            operands = [t if t is None else t.to(dtype) for t in operands]
        with torch._C.DisableTorchFunction():
            return Pruned.apply(
                lambda x, weight, bias: function(x, weight, bias, *rest, **named),
                lambda dense: self.prune(dense, kind, groups),
                *operands,
            )


def eager_sdgp(model, targets="conv", **settings):
    """Return model in eager mode with SDGP; its settings are those of EagerSDGP."""

    def forward(*args):
        with EagerSDGP(targets, **settings):
            return model(*args)

    return forward
