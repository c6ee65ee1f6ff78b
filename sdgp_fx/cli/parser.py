"""The parsers of all commands. They import no torch: it takes seconds, and may be missing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..arguments import PICTURES, OneLineParser, pattern, positive, refusing_values
from ..config import (
    INNER_COMPILERS,
    LAYERS,
    PRODUCTS,
    PRUNING_FUNCTIONS,
    RESCALE_SCOPES,
    STRUCTURES,
    TARGETS,
    SDGPConfig,
)


def make_parser() -> OneLineParser:
    """Make the parser of the command line.

    What it parses has, beside the command's settings, run, to be called with them, and fail, to be
    called with a usage error.
    """
    parser = OneLineParser(
        prog="sdgp" if Path(sys.argv[0]).stem == "sdgp" else "python -m sdgp_fx",
        description="Structured data gradient pruning as a torch.compile backend.",
        epilog="examples: %(prog)s demo --n 2 --m 4; %(prog)s explain resnet18",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_explain(commands)
    _add_doctor(commands)
    _add_profile(commands)
    return parser


def _checked(**options: Any) -> dict[str, Any]:
    """Return the backend's options; refuse those that it would."""
    named = {f"sdgp.{name}": value for name, value in options.items()}
    with refusing_values():
        SDGPConfig.from_options(named)
    return named


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a network dense and with pruned gradients, side by side",
        description="Train a timm network twice, dense and with pruned gradients (SDGP), from the "
        "same weights and on the same batches. Ends with a table and a picture of both loss "
        "curves; Ctrl-C ends it early, with what was measured so far.",
        epilog="example: python -m sdgp_fx demo --n 1 --m 4 --prune mvue",
    )
    demo.set_defaults(run=_run_demo, fail=demo.error)

    setting = demo.add_argument_group("setting of SDGP")
    add = setting.add_argument
    add("--n", type=int, default=2, help="values kept of every m channels (%(default)s)")
    add("--m", type=int, default=4, help="channels in a group, a power of two (%(default)s)")
    functions = f"one of {', '.join(PRUNING_FUNCTIONS)} (%(default)s)"
    add("--prune", default="rescaled_magnitude", metavar="FUNCTION", help=functions)
    scopes = f"of rescaled_magnitude: one of {', '.join(RESCALE_SCOPES)} (%(default)s)"
    add("--rescale", default="group", metavar="SCOPE", help=scopes)

    task = demo.add_argument_group("network and data")
    add = task.add_argument
    add("--model", default="resnet10t", metavar="NAME", help="a timm network (%(default)s)")
    add(
        "--data",
        choices=("digits", "cifar10"),
        default="digits",
        help="scikit-learn's handwritten digits, or CIFAR-10 from --root (%(default)s)",
    )
    add("--root", type=Path, metavar="DIR", help="folder that has cifar-10-batches-py in it")
    pixels = "height and width that images are resized to (%(default)s)"
    add("--size", type=positive(int), default=32, metavar="PIXELS", help=pixels)

    training = demo.add_argument_group("training")
    add = training.add_argument
    count = positive(int)
    add("--epochs", type=count, default=15, help="passes over the data (%(default)s)")
    add("--steps", type=count, help="training steps, instead of --epochs")
    add("--batch-size", type=count, default=64, metavar="IMAGES", help="in a step (%(default)s)")
    add("--lr", type=positive(float), default=0.05, help="peak learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 and so on (%(default)s)")
    add(
        "--inner",
        choices=INNER_COMPILERS,
        help="compiler of both networks (inductor if it finds a C++ compiler, else aot_eager)",
    )
    picture = "where the picture of the loss curves goes (%(default)s)"
    add("--out", type=Path, default=Path("sdgp_demo.png"), metavar="PNG", help=picture)


def _run_demo(*, n: int, m: int, prune: str, rescale: str, **settings: Any) -> None:
    options = _checked(n=n, m=m, prune=prune, rescale=rescale)
    from .demo import run

    run(options=options, **settings)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="show which layers of a network are pruned, and the multiply-adds",
        description="Show which layers of a timm network are pruned and which stay dense, why, and "
        "how many multiply-adds a training step has for each. Nothing is trained or computed, and "
        "a large network takes no memory.",
        epilog="examples: %(prog)s resnet50; %(prog)s convnext_tiny --targets conv,linear --plot "
        "convnext.png; %(prog)s vit_tiny_patch16_224 --targets linear --n 1 --m 8 --json",
    )
    explain.set_defaults(run=_run_explain, fail=explain.error)
    add = explain.add_argument
    add("model", metavar="MODEL", help="a timm network, such as resnet50")
    sizes = "of an image: 224, 192x256 or 1x224x224 (what the network is made for)"
    add("--input-size", type=_image_size, metavar="SIZE", help=sizes)
    add("--batch", type=positive(int), default=256, metavar="IMAGES", help="(%(default)s)")
    add("--targets", default="conv", help=f"one of {' '.join(TARGETS)} (%(default)s)")
    add("--n", type=int, default=2, help="values kept of every m channels (%(default)s)")
    add("--m", type=int, default=4, help="channels in a group, a power of two (%(default)s)")
    structures = f"of what is pruned: one of {', '.join(STRUCTURES)} (%(default)s)"
    add("--structure", default=STRUCTURES[0], metavar="NAME", help=structures)
    layers = "all that can be pruned, or those where it is expected to save time (%(default)s)"
    add("--layers", choices=LAYERS, default=LAYERS[0], help=layers)
    products = "what multiplies pruned elements (%(default)s)"
    add("--product", choices=PRODUCTS, default=PRODUCTS[0], help=products)
    add("--json", dest="as_json", action="store_true", help="print JSON instead of a table")
    pictures = f"draw the layers' multiply-adds, too; ends in {', '.join(PICTURES)}"
    add("--plot", type=Path, metavar="FILE", help=pictures)


def _run_explain(
    *,
    n: int,
    m: int,
    targets: str,
    structure: str,
    layers: str,
    product: str,
    **settings: Any,
) -> None:
    options = _checked(
        n=n, m=m, targets=targets, structure=structure, layers=layers, product=product
    )
    from .explain import run

    run(options=options, **settings)


def _image_size(text: str) -> tuple[int, ...]:
    """Parse H or HxW into (H, W), or CxHxW into (C, H, W); a type for argparse."""
    try:
        sizes = tuple(map(int, text.split("x")))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected 224, 192x256 or 1x224x224, got {text!r}")
    return sizes * 2 if len(sizes) == 1 else sizes


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say whether what the backend needs is there, and what it will use",
        description="Look for torch, Triton, a GPU, a C++ compiler and this package's entry point, "
        "and compile a small training step. For what is missing, say what to do. The exit code is "
        "1 if it is needed.",
        epilog="example: SDGP_INNER=aot_eager %(prog)s",
    )
    doctor.set_defaults(run=_run_doctor, fail=doctor.error)


def _run_doctor() -> None:
    from .doctor import run

    if code := run():
        sys.exit(code)


def _add_profile(commands: Any) -> None:
    profile = commands.add_parser(
        "profile",
        help="time a network's convolutions and its training step",
        description="Time forward, input gradient and weight gradient of every convolution of a "
        "timm network, and a training step, stock and with SDGP; estimate what pruned products "
        "save if they take n/m of their time. Runs on the GPU if there is one.",
        epilog="examples: %(prog)s resnet18; %(prog)s resnet50 --patterns 2:4 1:4 --plot t.png; "
        "%(prog)s regnetx_004 --no-step --json",
    )
    profile.set_defaults(run=_run_profile, fail=profile.error)
    add, count = profile.add_argument, positive(int)
    add("model", metavar="MODEL", help="a timm network, such as resnet18")
    add("--batch", type=count, metavar="IMAGES", help="(256 on a GPU, 16 on the CPU)")
    add("--size", type=count, default=224, metavar="PIXELS", help="(%(default)s)")
    dtypes = ("bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, help="(bfloat16 on a GPU, float32 on the CPU)")
    formats = ("channels_last", "contiguous")
    add("--memory-format", choices=formats, default=formats[0], help="(%(default)s)")
    patterns = "to estimate for; a step is measured for the first"
    default = ((2, 4), (1, 4), (4, 8), (2, 8), (1, 8))
    shown = f"{patterns} ({', '.join(f'{n}:{m}' for n, m in default)})"
    add("--patterns", nargs="+", type=pattern, default=default, metavar="N:M", help=shown)
    add("--inner", choices=INNER_COMPILERS, default="inductor", help="of the step (%(default)s)")
    seconds = "about how long to time each layer; the steps, 20 times as long (%(default)s)"
    add("--seconds", type=positive(float), default=0.5, help=seconds)
    add("--no-step", action="store_true", help="time the layers alone")
    add("--json", dest="as_json", action="store_true", help="print JSON instead of tables")
    add("--plot", type=Path, metavar="FILE", help="draw both, too: PNG, SVG or PDF")


def _run_profile(**settings: Any) -> None:
    from .profile import run

    run(**settings)
