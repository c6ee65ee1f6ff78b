"""`python -m benchmarks.paper NAME`: a table or figure of McDanel et al. 2022, measured again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from sdgp_fx.__main__ import positive
from sdgp_fx.config import INNER_COMPILERS

from .. import command
from ..report import Row, caption
from . import cifar10, pictures, settings, times
from .experiment import Setting, run, show


class Experiment(NamedTuple):
    """Settings to compare, and how the figure is drawn from the runs."""

    help: str
    settings: Sequence[Setting]
    draw: Callable[[Sequence[Row], Sequence[Setting], str], Figure]


EXPERIMENTS = {
    "table1": Experiment(
        "Table I, CIFAR-10: dense and the three functions of the paper at 2:4",
        settings.TABLE1,
        pictures.draw_accuracies,
    ),
    "fig6": Experiment(
        "Figures 6 and 7: loss and accuracy by epoch; takes table1's runs, if --out has them",
        settings.TABLE1,
        pictures.draw_curves,
    ),
    "fig8": Experiment(
        "Figure 8: rescaled magnitude, n:m from 2:4 to 4:32",
        settings.FIG8,
        pictures.draw_pattern,
    ),
    "beyond": Experiment(
        "not in the paper: mvue, and the scopes of the rescaled magnitude",
        settings.BEYOND,
        pictures.draw_accuracies,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in argv, sys.argv by default; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in times.FIGURES:
        return times.main(argv)
    parser = command.Parser(
        "paper",
        description="Train the paper's network on CIFAR-10 with several settings, from several "
        "seeds, by the paper's recipe; show accuracies and draw the figure. Runs that --out has "
        "already are not done again, so that an interrupted command goes on where it was. "
        "fig9 and fig10 train nothing, and have a --help of their own.",
        example="table1 --root DIR --out table1.json --picture table1.png",
    )
    add = parser.add_argument
    names = "; ".join(f"{name}: {experiment.help}" for name, experiment in EXPERIMENTS.items())
    add("name", choices=list(EXPERIMENTS), metavar="NAME", help=names)
    add("--root", type=Path, required=True, metavar="DIR", help="folder of CIFAR-10")
    add("--seeds", type=positive(int), default=3, help="runs of each setting (%(default)s)")
    add("--epochs", type=positive(int), default=cifar10.EPOCHS, help="(%(default)s)")
    add("--batch", type=positive(int), default=cifar10.BATCH, help="(%(default)s)")
    add("--lr", type=positive(float), default=cifar10.PEAK_LR, help="the peak's (%(default)s)")
    width = "channels of the first layer (%(default)s)"
    add("--width", type=positive(int), default=128, help=width)
    add("--fraction", type=share, default=1.0, help="of the images, for training and for the test")
    parser.add_dtype(command.DTYPES, "float16", "of autocast")
    add("--compiler", choices=INNER_COMPILERS, default="inductor", help="(%(default)s)")
    add("--picture", type=Path, metavar="FILE", help="PNG file")
    parser.add_out()
    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.name]
    recipe = cifar10.Recipe(args.epochs, args.batch, args.lr, args.width, args.dtype, args.compiler)
    try:
        for path in (args.out, args.picture):
            command.check_out(path)
        device = command.find_device(args.device)
        data, test = (
            cifar10.fraction_of(part, args.fraction) for part in cifar10.load(args.root, device)
        )
        # Figures 6 and 7 are drawn from the runs of Table I.
        name = "table1" if args.name == "fig6" else args.name
        report = run(name, experiment.settings, args.seeds, recipe, data, test, args.out)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    show(report.rows, experiment.settings)
    scale = describe(recipe, len(data))
    print(scale)
    print(caption(name, report.environment))
    if args.picture is not None:
        title = f"{args.name}: CIFAR-10, {scale}"
        pictures.save(experiment.draw(report.rows, experiment.settings, title), args.picture)
    return 0


def describe(recipe: cifar10.Recipe, images: int) -> str:
    """What was trained, and where that is less than the paper's recipe."""
    paper = cifar10.Recipe()
    less = [
        f"{name} {getattr(recipe, name)} (paper: {getattr(paper, name)})"
        for name in ("epochs", "batch", "lr", "width", "dtype")
        if getattr(recipe, name) != getattr(paper, name)
    ]
    whole = 50_000
    if images != whole:
        less.insert(0, f"{images} images (paper: {whole})")
    return ", ".join(less) or "the paper's recipe"


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected above 0 and up to 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
