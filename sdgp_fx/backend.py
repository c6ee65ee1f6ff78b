"""The torch.compile backend "sdgp": the pass on the joint graph, Inductor or aot_eager inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.exc import ShortenTraceback
from torch._functorch.partitioners import min_cut_rematerialization_partition

from .config import SDGPConfig
from .graph_pass import PruneInputGrads
from .inductor import DENSE_HALF_FIRST
from .passes.module_names import module_names
from .passes.rules import unmatched_patterns


class InvalidOption(ValueError, ShortenTraceback):
    """Reach the user of `torch.compile` as a ValueError.

    Any exception of a backend but a ShortenTraceback reaches the user as a
    BackendCompilerFailed, which is no ValueError.
    """

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


def sdgp(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    name: str | None = None,
    monitor: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's, as `torch.compile(model, backend="sdgp")` does.

    Args:
        gm, example_inputs: The graph and its inputs, as any backend gets them.
        options: "sdgp." keys as in `SDGPConfig`, other keys for Inductor.
        mode, name: Inductor's, as with `backend="inductor"`.
        monitor: As for `PruneInputGrads`, set by `sdgp_fx.monitor`.

    Returns:
        The compiled graph, to be called as gm is.

    Raises:
        ValueError: An option of ours is unknown or has a bad value. Raised before anything is
            compiled; Inductor raises its own errors for its options.
    """
    try:
        config, inductor_options = SDGPConfig.from_options(options)
    except ValueError as error:
        raise InvalidOption(str(error)) from None
    if monitor is not None and config.structure != "element":
        raise InvalidOption(
            f"sdgp.structure: expected 'element' with a monitor, got {config.structure!r}"
        )
    names = module_names(gm)
    for message in unmatched_patterns(config, names):
        warnings.warn(message, stacklevel=2)
    is_inductor = config.inner == "inductor"
    graph_pass = PruneInputGrads(
        config,
        before=_take_users_passes(inductor_options) if is_inductor else (),
        names=names,
        monitor=monitor,
        dense_half_first=DENSE_HALF_FIRST,
    )
    if is_inductor:
        return _inductor(gm, example_inputs, graph_pass, mode, inductor_options, name)
    ignored = [f"mode={mode!r}"] if mode else []
    ignored += [f"{key}={value!r}" for key, value in inductor_options.items()]
    if ignored:
        warnings.warn(f"sdgp.inner='aot_eager' ignores {', '.join(ignored)}", stacklevel=2)
    return aot_eager(graph_pass)(gm, example_inputs)


def _take_users_passes(options: dict[str, Any]) -> tuple[Callable[[fx.Graph], Any], ...]:
    """Take out of Inductor's options, or of its config, the passes that the user has put there."""
    import torch._inductor.config as inductor_config

    passes = options.pop("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass) or ()
    return tuple(passes) if isinstance(passes, (list, tuple)) else (passes,)


def _inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    graph_pass: PruneInputGrads,
    mode: str | None,
    options: dict[str, Any],
    name: str | None,
) -> Callable[..., Any]:
    from .inductor import lowering  # noqa: F401  (Importing it registers it.)

    options = {**options, "joint_custom_pre_pass": graph_pass}
    # The private class behind backend="inductor", so that modes, option names, their types and
    # errors are Inductor's own. torch 2.15 has the name.
    named = {} if name is None else {"name": name}
    compile_graph = torch._TorchCompileInductorWrapper(mode, options, None, **named)
    with graph_pass.observed():
        return compile_graph(gm, example_inputs)


def aot_eager(
    rewrite: Callable[[fx.Graph], Any],
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Return a backend that is the stock "aot_eager", with rewrite in between.

    Args:
        rewrite: Gets every joint graph before its split, and every inference graph, to change it.
        decompositions: Of operators, for graphs as another compiler has them; none by default.
    """

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        rewrite(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def compile_inference(graph: fx.GraphModule, inputs: Any) -> Any:
        rewrite(graph.graph)
        graph.recompile()
        return boxed_nop(graph, inputs)

    return aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        inference_compiler=compile_inference,
        partition_fn=partition,
        keep_inference_input_mutations=True,
        decompositions=dict(decompositions or {}),
    )
