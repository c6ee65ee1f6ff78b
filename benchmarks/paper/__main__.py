"""`python -m benchmarks.paper NAME`: measure a table or figure of McDanel et al. 2022 again."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from sdgp_fx.arguments import check_file, positive
from sdgp_fx.config import INNER_COMPILERS
from sdgp_fx.measurement.workload import DTYPES

from ..harness import command
from ..harness.report import Report, Row, caption
from . import cifar10, experiment, fast, maps, pictures, race, settings, signals, times
from .experiment import Setting

# Fields of a recipe that can differ from what is published.
_SHOWN = ("epochs", "batch", "lr", "width")
_SHOWN_OF_FAST = (*_SHOWN, "bias_scale")
RECIPES = {"paper": cifar10.Recipe, "fast": fast.FastRecipe}


class Experiment(NamedTuple):
    """A table or figure: settings, and how to compare and show them.

    Attributes:
        draw: Draws the figure from rows, settings and a title.
    """

    help: str
    settings: Sequence[Setting]
    draw: Callable[[Sequence[Row], Sequence[Setting], str], Figure]
    run: Callable[..., Report] = experiment.run
    show: Callable[[Sequence[Row], Sequence[Setting]], None] = experiment.show


EXPERIMENTS = {
    "fig4": Experiment(
        "Figures 4 and 5: a gradient in a ResNet-18, before and after each function",
        settings.BEYOND,
        maps.draw,
        maps.run,
        maps.show,
    ),
    "table1": Experiment(
        "Table I, CIFAR-10: dense and the three functions of the paper at 2:4",
        settings.TABLE1,
        pictures.draw_accuracies,
    ),
    "fig6": Experiment(
        "Figures 6 and 7: loss and accuracy by epoch, of the settings of Table I",
        settings.TABLE1,
        pictures.draw_curves,
    ),
    "fig8": Experiment(
        "Figure 8: rescaled magnitude, n:m from 2:4 to 4:32",
        settings.FIG8,
        pictures.draw_pattern,
    ),
    "beyond": Experiment(
        "not in the paper: also random times m/n, mvue, and the scopes of the rescaled magnitude",
        settings.BEYOND,
        pictures.draw_accuracies,
    ),
    "channels": Experiment(
        "not in the paper: whole channels, by each function, at 2:4, 1:4 and 2:16",
        settings.CHANNELS,
        pictures.draw_accuracies,
    ),
    "patterns": Experiment(
        "not in the paper: magnitude, and the rescaled one by group and by feature map, "
        "from 2:4 to 4:32, and with dense gradients at the end",
        settings.PATTERNS,
        pictures.draw_accuracies,
    ),
    "overview": Experiment(
        "not in the paper: all functions at 2:4, the magnitudes up to 4:32, and whole channels",
        settings.OVERVIEW,
        pictures.draw_accuracies,
    ),
    "race": Experiment(
        "Figure 10 as whole trainings: accuracy over time, of settings that take turns by epochs",
        settings.RACE,
        race.draw,
        race.run,
        race.show,
    ),
    "precision": Experiment(
        "not in the paper: float16 beside bfloat16",
        settings.PRECISION,
        pictures.draw_accuracies,
    ),
    "signal": Experiment(
        "not in the paper: how far off pruned gradients are, over depth and training",
        settings.SIGNAL,
        signals.draw,
        signals.run,
        signals.show,
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
        "already, of whatever table or figure, are not done again, so that an interrupted command "
        "goes on where it was. fig4 and signal keep no runs, but gradients, and race runs that "
        "took turns: they take an --out of their own. fig9 and fig10 train nothing, and have a "
        "--help of their own.",
        example="table1 --root DIR --out runs.json --picture table1.png",
    )
    add = parser.add_argument
    names = "; ".join(f"{name}: {chosen.help}" for name, chosen in EXPERIMENTS.items())
    add("name", choices=list(EXPERIMENTS), metavar="NAME", help=names)
    add("--root", type=Path, required=True, metavar="DIR", help="folder of CIFAR-10")
    add("--seeds", type=positive(int), default=3, help="runs of each setting (%(default)s)")
    recipes = "paper: 150 epochs of a ResNet-9; fast: ten of a smaller network (%(default)s)"
    add("--recipe", choices=list(RECIPES), default="paper", help=recipes)
    add("--epochs", type=positive(float), help="150, fast: 9.9")
    add("--batch", type=positive(int), help="512, fast: 1024")
    add("--lr", type=positive(float), help="the peak's: 0.5, fast: 11.5")
    width = "channels of the first layer: 128, fast: a factor of all channels: 1"
    add("--width", type=positive(float), help=width)
    parser.add_list("--only", "only", (), "a setting, of all that there are", metavar="NAME")
    bias = "fast: how many times as fast as weights BatchNorm's biases learn: 64"
    add("--bias-scale", type=positive(float), help=bias)
    curve = f"fast: test on {fast.CURVE_IMAGES} images after every epoch, on all after the last"
    add("--curve", action="store_true", help=curve)
    add("--minutes", type=positive(float), default=math.inf, help="no run is begun later")
    add("--fraction", type=share, default=1.0, help="of the training images (%(default)s)")
    add("--test-fraction", type=share, default=1.0, help="of the test images (%(default)s)")
    parser.add_dtype(DTYPES, "float16", "of autocast")
    add("--compiler", choices=INNER_COMPILERS, default="inductor", help="(%(default)s)")
    add("--picture", type=Path, metavar="FILE", help="PNG file")
    parser.add_out()
    args = parser.parse_args(argv)
    chosen = EXPERIMENTS[args.name]
    try:
        recipe = make_recipe(args)
        compared = [
            dataclasses.replace(setting, dtype=setting.dtype or args.dtype)
            for setting in select(chosen.settings, args.only)
        ]
        check_file("--out", args.out)
        check_file("--picture", args.picture)
        device = command.find_device(args.device)
        data, test = cifar10.load(args.root, device)
        data = cifar10.fraction_of(data, args.fraction)
        test = cifar10.fraction_of(test, args.test_fraction)
        limits = {"minutes": args.minutes} if chosen.run is experiment.run else {}
        report = chosen.run(compared, args.seeds, recipe, data, test, args.out, **limits)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    chosen.show(report.rows, compared)
    scale = describe(recipe, compared, len(data), len(test))
    print(scale)
    print(caption(args.name, report.environment))
    if args.picture is not None:
        title = f"{args.name}: CIFAR-10, {scale}"
        pictures.save(chosen.draw(report.rows, compared, title), args.picture)
    return 0


def make_recipe(args: argparse.Namespace) -> cifar10.Recipe | fast.FastRecipe:
    """Make the recipe that args ask for, of what is published where they are silent.

    Raises:
        ValueError: An option is not for this recipe.
    """
    asked = {name: getattr(args, name) for name in _SHOWN_OF_FAST}
    given = {name: value for name, value in asked.items() if value is not None}
    given |= {"dtype": args.dtype, "compiler": args.compiler}
    if args.recipe == "fast":
        if EXPERIMENTS[args.name].run is maps.run:
            raise ValueError(f"--recipe: expected paper for {args.name}, got fast")
        return fast.FastRecipe(**given, curve=args.curve)
    if EXPERIMENTS[args.name].run is race.run:
        raise ValueError(f"--recipe: expected fast for {args.name}, got paper")
    if args.curve:
        raise ValueError("--curve: expected --recipe fast, got paper, which always has the curve")
    if args.bias_scale:
        raise ValueError("--bias-scale: expected --recipe fast, got paper")
    for name in {"epochs", "width"} & given.keys():
        if given[name] % 1:
            raise ValueError(f"--{name}: expected an int with --recipe paper, got {given[name]}")
        given[name] = int(given[name])
    return cifar10.Recipe(**given)


def select(settings: Sequence[Setting], names: Sequence[str]) -> list[Setting]:
    """Return the settings of these names, all for none.

    Raises:
        ValueError: There is no setting of a name.
    """
    named = {setting.name: setting for setting in settings}
    for name in names:
        if name not in named:
            raise ValueError(f"--only: expected one of {'; '.join(named)}, got {name}")
    return [named[name] for name in names or named]


def describe(
    recipe: cifar10.Recipe | fast.FastRecipe,
    compared: Sequence[Setting],
    images: int,
    test_images: int,
) -> str:
    """Say where what was trained is not the published recipe."""
    is_fast = isinstance(recipe, fast.FastRecipe)
    shown = _SHOWN_OF_FAST if is_fast else _SHOWN
    paper = type(recipe)()
    dtypes = sorted({setting.dtype or recipe.dtype for setting in compared})
    facts = [
        ("training images", images, 50_000),
        ("test images", test_images, 10_000),
        *((name, getattr(recipe, name), getattr(paper, name)) for name in shown),
        ("dtype", " and ".join(dtypes), paper.dtype),
    ]
    return experiment.against_paper(facts, "fast recipe" if is_fast else "paper")


def share(text: str) -> float:
    """Parse a number above 0 and up to 1; a type for argparse."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected above 0 and up to 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
