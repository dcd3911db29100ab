"""The commands of the command line for Slurm jobs, and for looking at and ending any run."""

from __future__ import annotations

from typing import Any

import click

from launcher import complete
from launcher.cli_options import STRATEGIES, all_settings


@click.command(short_help="Train on a Slurm cluster.")
@click.argument("target", shell_complete=complete.recipes)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]... [-- ARGUMENTS]...")
@click.option("-m", "--module", is_flag=True, help="TARGET is a module of your own, as for python -m.")
@click.option("--nodes", type=click.IntRange(1), help="Number of machines.")
@click.option("--gpus-per-node", type=click.IntRange(1), help="GPUs of each, or CPU ranks where slurm.gpus is none.")
@click.option("--strategy", type=click.Choice(STRATEGIES), help="How training is spread; else auto.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of a script; else its own.")
@click.option("--name", help="Name of a script's run directory; of a recipe's: name=...")
@click.option("--seeds", type=click.IntRange(1), help="An array of runs with so many seeds.")
@click.option("--folds", type=click.IntRange(2), help="An array of runs, each tested on another of so many folds.")
@click.option("--ladder", is_flag=True, help="An array of the runs of `dist-train ablate`, with --seeds of each.")
@click.option("--checkpoint", help="TARGET is a run: evaluate its checkpoint best, last or STEP, as `dist-train eval`.")
@click.option("--after", metavar="RUN", help="Start when the job of this run has ended well.")
@click.option("--dry-run", "is_dry", is_flag=True, help="Print the script, and do nothing.")
def submit(target: str, words: tuple[str, ...], module: bool, after: str | None, is_dry: bool, **flags: Any) -> None:
    """Check and plan TARGET for the cluster, copy the code into the run directory, and submit one job.

    TARGET is a recipe with its settings, or your own script (train.py) with settings slurm.KEY=VALUE and its arguments.
    A recipe's job saves and requeues itself at its time limit and when it is preempted, until the report is written.
    What the cluster is asked for is in the keys slurm.*, best set once in the site file.
    """
    from launcher import array as arrays
    from launcher import submit as jobs

    array = {name: flags.pop(name) for name in ("seeds", "folds", "ladder", "checkpoint")}
    if (module or target.endswith(".py")) and any(array.values()):
        raise click.UsageError("--seeds, --folds, --ladder and --checkpoint are for recipes, not for a script.")
    if array["checkpoint"] is not None and (array["seeds"] or array["folds"] or array["ladder"]):
        raise click.UsageError("--checkpoint evaluates one run: it makes no array.")
    if array["folds"] and (array["seeds"] or array["ladder"]):
        raise click.UsageError("--folds goes with neither --seeds nor --ladder.")
    if module or target.endswith(".py"):
        jobs.submit_script((["-m"] if module else []) + [target], list(words), is_dry, after, flags)
        return
    for name, key in (("precision", "train.precision"), ("name", "name")):
        if flags.pop(name) is not None:
            raise click.UsageError(f"--{name} is for a script: give a recipe {key}=...")
    settings = all_settings(words, flags)
    if array["checkpoint"] is not None:
        jobs.submit_evaluation(target, settings, array["checkpoint"], is_dry, after)
    elif array["ladder"]:
        arrays.submit_ladder(target, settings, array["seeds"] or 3, is_dry, after)
    elif array["folds"] is not None:
        arrays.submit_folds(target, settings, array["folds"], is_dry, after)
    elif array["seeds"] is not None:
        arrays.submit_seeds(target, settings, array["seeds"], is_dry, after)
    else:
        jobs.submit_recipe(target, settings, is_dry, after)


@click.command(short_help="How far a run is, and why it ended.")
@click.argument("run_dir", shell_complete=complete.runs)
def status(run_dir: str) -> None:
    """State, step, loss, rate, time left, starts, newest checkpoint, and the cause of the last end in words."""
    from launcher.status import print_status

    print_status(run_dir)


@click.command(short_help="What a run has said.")
@click.argument("run_dir", shell_complete=complete.runs)
@click.option("-f", "--follow", "follows", is_flag=True, help="Go on printing while the run goes on.")
@click.option("--rank", type=click.IntRange(0), help="The log of this rank; else that of the job, or of rank 0.")
def logs(run_dir: str, follows: bool, rank: int | None) -> None:
    """Print the output of RUN_DIR's job, or of one of its ranks."""
    from launcher.status import print_logs

    print_logs(run_dir, rank, follows)


@click.command(short_help="End a run.")
@click.argument("run_dir", shell_complete=complete.runs)
def cancel(run_dir: str) -> None:
    """End RUN_DIR, on this machine or on Slurm, where it is not requeued. What is saved stays; `resume` goes on."""
    from launcher.status import cancel as end

    end(run_dir)


@click.command(hidden=True)
@click.argument("run_dir")
@click.argument("index", type=int, required=False)
def node(run_dir: str, index: int | None) -> None:
    """Train the submitted run, or the one at INDEX of an array, on this node of its Slurm job."""
    from launcher.job import run_node
    from launcher.summary import print_summary

    run = run_node(run_dir, index)
    if run is not None and run.report_json.is_file():  # a training that was only timed has none
        print_summary(run)


COMMANDS = (submit, status, logs, cancel, node)
