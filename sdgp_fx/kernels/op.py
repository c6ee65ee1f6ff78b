"""The operators sdgp::prune_nm and sdgp::channel_factor, and `prune`, the function for users."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..config import PRUNING_FUNCTIONS, RESCALE_SCOPES, check_choice, check_pattern
from . import cpp_prune, reference

# The pruning functions that draw random numbers, and need a seed.
STOCHASTIC = ("random", "mvue")


def supports_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether gradients of this dtype can be pruned on this device."""
    if dtype == torch.float64:
        return device.type == "cpu"
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


_LIBRARY = torch.library.Library("sdgp", "FRAGMENT")
# Not a `custom_op`, whose layers of Python would take longer than pruning a small gradient. Of type
# int, which a symbolic number becomes one for, where Python's int would be a SymInt.
_LIBRARY.define(
    "prune_nm(Tensor grad_output, Tensor? seed, int n, int m, str prune, str rescale, int groups) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

PRUNE_NM = torch.ops.sdgp.prune_nm.default

# What prunes a gradient, by all that does not differ from one step to the next: checking and
# preparing it once serves all steps. Where sizes differ from step to step there is no end of them.
Pruner = Callable[[Tensor, Tensor | None], Tensor]
_prepared: dict[Hashable, Pruner] = {}
MOST_PREPARED = 10_000


def prune_nm(
    grad_output: Tensor,
    seed: Tensor | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    groups: int,
) -> Tensor:
    """Keep n of every m consecutive channels of grad_output (McDanel et al. 2022, III-B).

    Args:
        grad_output: (N, C, *spatial), C / groups a multiple of m; float32, bfloat16, float16, or
            float64 on the CPU; any strides. NCHW and channels-last are read in place.
        seed: One int64 on the device of grad_output, for "random" and "mvue"; None for the
            others. The same seed draws the same numbers on every device and for all strides.
        n, m, prune, rescale: As in `SDGPConfig`.
        groups: Groups of channels that the layer convolves separately.

    Returns:
        A new tensor, shaped and strided as `torch.empty_like(grad_output)`.

    Raises:
        ValueError: An argument is not as described here and in `SDGPConfig`.
        RuntimeError: A derivative of the operator would be needed, which it hasn't.
    """
    # Few functions of Python's, one in the other: where the frames of deeper ones do not fit into
    # the piece of memory that Python has for them, each call of them gets another from the system.
    key = (
        *(grad_output.shape, grad_output.stride(), grad_output.dtype, grad_output.device),
        None if seed is None else (seed.shape, seed.dtype),
        *(n, m, prune, rescale, groups),
    )
    compute = _prepared.get(key)
    if compute is None:
        check_arguments(grad_output, seed, n, m, prune, rescale, groups)
        compute = _prepare(grad_output, n, m, prune, rescale)
        if len(_prepared) >= MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = compute
    if grad_output.requires_grad and torch.is_grad_enabled():
        _refuse_derivative(grad_output)
    return compute(grad_output, seed)


def _prepare(grad_output: Tensor, n: int, m: int, prune: str, rescale: str) -> Pruner:
    """Return a function of a gradient like this one, and of a seed, that prunes the gradient."""
    if grad_output.is_cuda:
        from . import triton_prune

        return lambda g, seed: triton_prune.prune_nm(g, seed, n, m, prune, rescale)
    if grad_output.is_cpu and not cpp_prune.why_not(grad_output.dtype, grad_output.dim(), prune):
        return cpp_prune.prepare(grad_output, n, m, prune, rescale)
    return lambda g, seed: reference.prune_nm(g, seed, n, m, prune, rescale)


_LIBRARY.impl("prune_nm", prune_nm, "CompositeExplicitAutograd")


@torch.library.register_fake("sdgp::prune_nm", lib=_LIBRARY)
def _(grad_output: Tensor, *settings: Any) -> Tensor:
    check_arguments(grad_output, *settings)
    _refuse_derivative(grad_output)
    return torch.empty_like(grad_output)


@torch.library.custom_op(
    "sdgp::channel_factor", mutates_args=(), schema="(Tensor grad_output, int n, int m) -> Tensor"
)
def channel_factor(grad_output: Tensor, n: int, m: int) -> Tensor:
    """Compute what "rescaled_magnitude" with scope "channel" multiplies each channel by.

    Args:
        grad_output: As for sdgp::prune_nm; C a multiple of m.
        n, m: As in `SDGPConfig`.

    Returns:
        (C,), in float32; in float64 for a float64 gradient.

    Raises:
        ValueError: An argument is not as described here and in `SDGPConfig`.
    """
    _check_gradient(grad_output, n, m, groups=1)
    return reference.channel_factor(grad_output, n, m)


CHANNEL_FACTOR = torch.ops.sdgp.channel_factor.default


@channel_factor.register_kernel("cuda")
def _(grad_output: Tensor, n: int, m: int) -> Tensor:
    from . import triton_prune

    _check_gradient(grad_output, n, m, groups=1)
    return triton_prune.channel_factor(grad_output, n, m)


@channel_factor.register_fake
def _(grad_output: Tensor, n: int, m: int) -> Tensor:
    _check_gradient(grad_output, n, m, groups=1)
    dtype = reference.accumulation_dtype(grad_output.dtype)
    return grad_output.new_empty((grad_output.shape[1],), dtype=dtype)


def prune(
    grad_output: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    prune: str = "rescaled_magnitude",
    rescale: str = "group",
    groups: int = 1,
) -> Tensor:
    """Prune an output gradient n:m along its channels, as the backend does in the graph.

    "random" and "mvue" draw a seed from torch's default generator for the device, so
    `torch.manual_seed` makes them repeat.

    Args:
        grad_output: (N, C, *spatial), C / groups a multiple of m; float32, bfloat16, float16, or
            float64 on the CPU; any strides.
        n, m, prune, rescale: As in `SDGPConfig`.
        groups: Groups of channels that the layer convolves separately.

    Returns:
        A new tensor, shaped and strided as `torch.empty_like(grad_output)`.

    Raises:
        ValueError: An argument is not as described here and in `SDGPConfig`.

    A backward pass through the result raises a RuntimeError: pruning has no derivative.

    >>> prune(torch.tensor([[[1.0], [-4.0], [2.0], [3.0]]])).flatten()
    tensor([ 0.0000, -5.7143,  0.0000,  4.2857])
    """
    check_choice("prune", prune, PRUNING_FUNCTIONS)
    seed = None
    if prune in STOCHASTIC:
        seed = torch.randint(2**63 - 1, (1,), device=grad_output.device)
    if grad_output.requires_grad and torch.is_grad_enabled():
        pruned: Tensor = _WithoutDerivative.apply(grad_output, seed, n, m, prune, rescale, groups)
        return pruned
    return torch.ops.sdgp.prune_nm(grad_output, seed, n, m, prune, rescale, groups)


class _WithoutDerivative(torch.autograd.Function):
    """The operator, whose result may be used where a graph is recorded, but for its derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        result: Tensor = PRUNE_NM(*arguments)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError("sdgp::prune_nm has no derivative")


def check_arguments(
    grad_output: Tensor,
    seed: Tensor | None,
    n: int,
    m: int,
    prune: str,
    rescale: str,
    groups: int,
) -> None:
    check_choice("prune", prune, PRUNING_FUNCTIONS)
    check_choice("rescale", rescale, RESCALE_SCOPES)
    _check_gradient(grad_output, n, m, groups)
    if prune in STOCHASTIC and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        got = "None" if seed is None else f"{tuple(seed.shape)} of {seed.dtype}"
        raise ValueError(f"seed: expected one int64 for prune = {prune!r}, got {got}")


def _refuse_derivative(grad_output: Tensor) -> None:
    # Autograd would warn of it, and give no gradient.
    if grad_output.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("sdgp::prune_nm has no derivative")


def _check_gradient(grad_output: Tensor, n: int, m: int, groups: int) -> None:
    check_pattern(n, m)
    if not supports_dtype(grad_output.dtype, grad_output.device):
        raise ValueError(
            "grad_output: expected float32, bfloat16, float16, or float64 on the CPU, "
            f"got {grad_output.dtype} on {grad_output.device.type}"
        )
    if grad_output.dim() < 2:
        raise ValueError(
            f"grad_output: expected (N, C, *spatial), got {grad_output.dim()} dimension(s)"
        )
    if groups < 1 or grad_output.shape[1] % (groups * m):
        raise ValueError(
            "groups: expected a number of convolution groups that leaves each a multiple of "
            f"m = {m} channels, got {groups} groups of {grad_output.shape[1]} channels"
        )
