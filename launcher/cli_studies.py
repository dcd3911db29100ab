"""The commands of the command line that make several runs and compare them."""

from __future__ import annotations

import sys
from typing import Any

import click

from launcher import complete
from launcher.cli_options import STRATEGIES, study_options


@click.command(short_help="What each component of a recipe adds.")
@click.argument("recipe", shell_complete=complete.recipes)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete.settings)
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each rung, from `seed` on."
)
@study_options
def ablate(recipe: str, settings: tuple[str, ...], **options: Any) -> None:
    """Train every rung of the recipe's `ladder` over several seeds, and print what each adds, with paired intervals.

    The same command goes on with a study that was broken off: finished runs are kept.
    """
    from launcher.ablate import ablate as run_study

    sys.exit(run_study(recipe, list(settings), **options))


@click.command(short_help="How a model ages, and when to train again.")
@click.argument("recipe", shell_complete=complete.recipes)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete.settings)
@click.option("--cuts", type=click.IntRange(2), default=4, show_default=True, help="Models, data.period_days apart.")
@click.option(
    "--tolerance", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Share of the metric to give up."
)
@study_options
def backtest(recipe: str, settings: tuple[str, ...], **options: Any) -> None:
    """Train RECIPE up to several moments and test each model on all that came after: how it falls with its age.

    The same command goes on with a study that was broken off: finished runs are kept.
    """
    from launcher.backtest import backtest as run_study

    sys.exit(run_study(recipe, list(settings), **options))


@click.command(short_help="How training speeds up with more ranks.")
@click.argument("recipe", shell_complete=complete.recipes)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete.settings)
@click.option("--gpus-per-node", required=True, metavar="N,N,...", help="Ranks to try on each machine: GPUs, or cores.")
@click.option("--nodes", default="1", show_default=True, metavar="N,N,...", help="Machines to try.")
@click.option("--strategy", default="ddp", show_default=True, metavar="NAME,...", help="Strategies to try.")
@click.option(
    "--mode",
    type=click.Choice(["strong", "weak"]),
    default="strong",
    show_default=True,
    help="strong: the same global batch at every size; weak: the same share of it on every rank.",
)
@click.option("--steps", type=click.IntRange(2), default=50, show_default=True, help="Measured steps of a repeat.")
@click.option("--warm-up", type=int, default=10, show_default=True, help="Steps before them.")
@click.option("--repeat", "repeats", type=click.IntRange(1), default=3, show_default=True, help="Repeats of each size.")
@click.option("--price", "price_per_hour", type=click.FloatRange(0), help="Of one rank for an hour, for the costs.")
@click.option("--resume", "is_resumed", is_flag=True, help="Go on with a study, running what is missing or failed.")
def scale(
    recipe: str,
    settings: tuple[str, ...],
    gpus_per_node: str,
    nodes: str,
    strategy: str,
    is_resumed: bool,
    **options: Any,
) -> None:
    """Time the training of RECIPE at several sizes, and print what more ranks bring, with its spread.

    Repeats are interleaved, the warm-up is left out, every size trains the same batches, and the losses are compared.
    """
    from launcher.scale import Asked, parse_sizes
    from launcher.scale import scale as run_study

    sizes = parse_sizes(gpus_per_node, nodes, strategy, [name for name in STRATEGIES if name != "auto"])
    sys.exit(run_study(Asked(recipe, settings, sizes, **options), is_resumed))


COMMANDS = (ablate, backtest, scale)
