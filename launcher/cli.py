"""The command line. Commands are imported when they are called, so that --help answers at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import click

from dist_train import __version__
from dist_train.errors import ToolkitError
from launcher import cli_jobs, cli_studies, complete
from launcher.cli_options import STRATEGIES, all_settings
from launcher.output import make_output_steady


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dist-train")
def cli() -> None:
    """Train, evaluate and report: the same command and the same numbers on any hardware.

    Settings are given as key=value, for example train.epochs=3; `dist-train recipes --keys RECIPE` lists them.
    """


@cli.command(short_help="Train a recipe to its report.")
@click.argument("recipe", shell_complete=complete.recipes)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete.settings)
@click.option("--gpu-ids", help="GPUs to use, as indices or UUIDs with commas between.")
@click.option("--nodes", type=int, help="Same as parallel.nodes=N.")
@click.option("--gpus-per-node", type=int, help="Same as parallel.processes_per_node=K.")
@click.option("--strategy", help="Same as parallel.strategy=NAME.")
@click.option("--node-rank", type=click.IntRange(0), help="Which of several machines this is, from 0.")
@click.option("--head", metavar="HOST:PORT", help="Where the machines meet: a host of node 0, and a free port there.")
@click.option("--debug", is_flag=True, help="One rank in this process: breakpoints work.")
def run(
    recipe: str, settings: tuple[str, ...], debug: bool, node_rank: int | None, head: str | None, **flags: Any
) -> None:
    """Train RECIPE, evaluate it against its baselines and write the report.

    RECIPE is a shipped recipe (ticket_routing, ticket_routing/demo) or the path of a recipe.yaml. On several machines
    type the same on each, with --nodes N --head HOST:PORT and its own --node-rank.
    """
    from launcher import start
    from launcher.allocated import in_foreign_allocation, run_in_allocation
    from launcher.nodes import place_by_hand
    from launcher.summary import print_summary

    words = all_settings(settings, flags, debug)
    place = place_by_hand(flags["nodes"], node_rank, head)
    if place is None and not debug and in_foreign_allocation():
        run_in_allocation(recipe, words)
    elif place is not None and place.node_rank > 0:
        start.join(place, [recipe, *words])
    else:
        print_summary(start.run(recipe, words, debug, place))


@cli.command(short_help="Go on with a run that was stopped.")
@click.argument("run_dir", shell_complete=complete.runs)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete.settings)
@click.option(
    "--accept", multiple=True, type=click.Choice(["code", "data", "config"]), help="Go on although this changed."
)
@click.option("--gpu-ids", help="GPUs to use, as indices or UUIDs with commas between.")
@click.option("--nodes", type=int, help="Same as parallel.nodes=N.")
@click.option("--gpus-per-node", type=int, help="Same as parallel.processes_per_node=K.")
@click.option("--strategy", help="Same as parallel.strategy=NAME.")
@click.option("--node-rank", type=click.IntRange(0), help="Which of several machines this is, from 0.")
@click.option("--head", metavar="HOST:PORT", help="Where the machines meet: a host of node 0, and a free port there.")
@click.option("--here", "is_here", is_flag=True, help="On this machine, although it was submitted to Slurm.")
@click.option("--debug", is_flag=True, help="One rank in this process: breakpoints work.")
def resume(
    run_dir: str,
    settings: tuple[str, ...],
    accept: tuple[str, ...],
    is_here: bool,
    debug: bool,
    node_rank: int | None,
    head: str | None,
    **flags: Any,
) -> None:
    """Go on from the newest whole checkpoint of RUN_DIR, on any number of ranks. What was submitted is submitted again.

    What defines the result (data, model, optimizer, batch, schedule) cannot change; parallel.*, checkpoint.*, track.*
    and train.stop_after_steps can.
    """
    from launcher import start
    from launcher.handed_in import was_submitted
    from launcher.nodes import place_by_hand
    from launcher.submit import resubmit
    from launcher.summary import print_summary

    words = all_settings(settings, flags, debug)
    place = place_by_hand(flags["nodes"], node_rank, head)
    if was_submitted(run_dir) and not is_here and place is None:
        if debug:
            raise click.UsageError("--debug is for this machine: add --here, since the run was submitted to Slurm.")
        resubmit(run_dir, words, list(accept))
    elif place is not None and place.node_rank > 0:
        start.join(place, [run_dir, *words])
    else:
        print_summary(start.resume(run_dir, words, list(accept), debug, place))


@cli.command(
    short_help="Start your own training script.",
    context_settings={"allow_interspersed_args": False},
    no_args_is_help=True,
)
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[--] [ARGUMENTS]...")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Number of machines.")
@click.option("--gpus-per-node", type=click.IntRange(1), help="Ranks on each: GPUs, or CPU processes. Else every GPU.")
@click.option("--gpu-ids", help="GPUs to use, as indices or UUIDs with commas between.")
@click.option("--strategy", type=click.Choice(STRATEGIES), default="auto", show_default=True)
@click.option("--offload", type=click.Choice(["optimizer", "parameters"]), help="What ZeRO keeps in the CPU's memory.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Else the script's own.")
@click.option("--deepspeed-config", type=click.Path(), help="Your own DeepSpeed JSON to build on.")
@click.option("--accelerate-config", type=click.Path(), help="Your own Accelerate YAML to build on.")
@click.option("--name", help="Name of the run directory; else script and time.")
@click.option("--output-dir", help="Folder that holds the run directories; else that of the site file, else runs.")
def launch(script: str, arguments: tuple[str, ...], module: bool, **options: Any) -> None:
    """Start SCRIPT, unchanged, on every rank, with generated Accelerate and DeepSpeed configs.

    For scripts that use Accelerate, the Hugging Face Trainer or plain torch under torchrun. What follows SCRIPT is its
    own: dist-train launch --gpus-per-node 2 train.py -- --lr 1e-3
    """
    from launcher.launch import launch_script

    given = arguments[1:] if arguments[:1] == ("--",) else arguments
    launch_script((["-m"] if module else []) + [script, *given], **options)


@cli.command(short_help="Write a recipe file for your own data.")
@click.argument("name")
@click.option("--from", "recipe", default="ticket_routing", show_default=True, help="The recipe to build on.")
@click.option("--data", required=True, metavar="FILE", help="Your CSV, TSV, JSONL or Parquet file (.gz too).")
@click.option("--label", metavar="COLUMN", help="The column to predict; else the one that looks like it.")
@click.option("--text", metavar="COLUMN", multiple=True, help="A column to read; may be given several times.")
def init(name: str, recipe: str, data: str, label: str | None, text: tuple[str, ...]) -> None:
    """Write NAME/recipe.yaml, a commented starter, by looking at the columns of your file."""
    from launcher.init import init as write_recipe

    write_recipe(name, recipe, data, label, list(text))


@cli.command(short_help="Show what a run would do, and start nothing.")
@click.argument("recipe", shell_complete=complete.recipes)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete.settings)
@click.option("--nodes", type=int, help="Same as parallel.nodes=N.")
@click.option("--gpus-per-node", type=int, help="Same as parallel.processes_per_node=K.")
@click.option("--strategy", help="Same as parallel.strategy=NAME.")
@click.option("--gpu-memory", metavar="SIZE", help="Plan for GPUs of this memory that are not here, for example 80GiB.")
def plan(recipe: str, settings: tuple[str, ...], gpu_memory: str | None, **flags: Any) -> None:
    """Read RECIPE and its data, and print the resolved settings with their origin, memory by strategy, and the plan.

    With --gpu-memory it is the plan for --nodes machines with --gpus-per-node such GPUs each, wherever they are.
    """
    from launcher.show_plan import show_plan

    show_plan(recipe, all_settings(settings, flags), gpu_memory)


@cli.command(short_help="Prepare a recipe's data, without GPUs.")
@click.argument("recipe", shell_complete=complete.recipes)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete.settings)
def prepare(recipe: str, settings: tuple[str, ...]) -> None:
    """Read, validate, split and tokenise the data of RECIPE into the cache folder, where later runs find it.

    Stopped or killed, it goes on where it was when it is typed again. Of data that has grown only what is new is read.
    """
    from launcher.prepare import prepare_recipe

    prepare_recipe(recipe, list(settings))


@cli.command(short_help="Check that every strategy trains a recipe alike.")
@click.argument("recipe", shell_complete=complete.recipes)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete.settings)
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks to shard over; else the GPUs here, or 2 on a CPU.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Optimizer steps to compare.")
@click.option("--tolerance", type=float, help="Largest relative difference; else 1e-5 on a CPU, 1e-3 on GPUs.")
def parity(recipe: str, settings: tuple[str, ...], ranks: int | None, steps: int, tolerance: float | None) -> None:
    """Train RECIPE for a few steps under each strategy and split that this machine can run, and compare.

    Losses, gradient norms and gradients of each step are held against those of one process; exit 10 past the tolerance.
    """
    from launcher.parity import check_parity

    check_parity(recipe, list(settings), ranks, steps, tolerance)


@cli.command(short_help="Try a new machine or cluster once, whole.")
@click.option("--nodes", type=int, help="Machines; only 1 so far: run it on each one.")
@click.option("--gpus-per-node", type=int, help="GPUs of each machine, or CPU ranks; else every GPU, or 2 on a CPU.")
@click.option("--output", default="accept.json", show_default=True, help="File of the results, to send in.")
def accept(nodes: int | None, gpus_per_node: int | None, output: str) -> None:
    """The doctor's checks, collective bandwidth, every strategy with parity, kill and resume: about five minutes.

    Ends with one table and a file with all that was seen. Exit 10 when something is not as it must be.
    """
    from launcher.accept import accept_machine

    accept_machine(nodes, gpus_per_node, output)


@cli.command(short_help="Answer the rows of a file with a trained model.")
@click.argument("run_dir", shell_complete=complete.runs)
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@click.option("--output", help="Where the answers go, ending in .parquet, .csv or .jsonl; else CSV to standard output.")
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=1),
    help="Processes; else every GPU, or one on a CPU. On a CPU each has one thread.",
)
def predict(run_dir: str, file: str, output: str | None, gpus_per_node: int | None) -> None:
    """Answer the rows of FILE with the model of RUN_DIR (a run, or a model folder).

    FILE: CSV, TSV, JSONL or Parquet (.gz too), a quoted glob, a folder of them or of images, or - for standard input.
    """
    from launcher.predict import predict as answer

    answer(run_dir, file, output, gpus_per_node)


@cli.command("add-items", short_help="Put new items into a recommender's catalogue.")
@click.argument("path", metavar="RUN", shell_complete=complete.runs)
@click.argument("file", metavar="FILE")
@click.option("--output", required=True, metavar="FOLDER", help="The model folder to write; it must not be there yet.")
def add_items(path: str, file: str, output: str) -> None:
    """Add the items of FILE, an item table like the one of the training, to the catalogue of the model of RUN.

    They are ranked by their content; nothing is trained. `dist-train predict FOLDER` then recommends them too.
    """
    from launcher.add_items import add_items as add

    add(path, file, output)


@cli.command("eval", short_help="Evaluate a checkpoint of a run again.")
@click.argument("run_dir", shell_complete=complete.runs)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a step.")
def eval_command(run_dir: str, checkpoint: str) -> None:
    """Evaluate a checkpoint of RUN_DIR on validation and test, and write predictions and report anew.

    Those of the best checkpoint are the run's own; those of another go to RUN_DIR/evaluations/ and touch nothing else.
    """
    from launcher import start
    from launcher.summary import print_summary

    print_summary(*start.evaluate(run_dir, checkpoint))


@cli.command(short_help="How long one row takes.")
@click.argument("path", metavar="RUN", shell_complete=complete.runs)
@click.argument("source", metavar="FILE")
@click.option("--rows", type=click.IntRange(20), default=300, show_default=True, help="How many rows are timed.")
def latency(path: str, source: str, rows: int) -> None:
    """Answer the rows of FILE, or the images of a folder, one by one, and print percentiles of each stage.

    RUN is a run directory or a model folder. With one thread, and with as many as there are cores.
    """
    from launcher.latency import measure

    measure(path, source, rows)


@cli.command(short_help="Write a run's report again.")
@click.argument("run_dir", shell_complete=complete.runs)
def report(run_dir: str) -> None:
    """Build report.json, report.md and report.html of RUN_DIR from its kept predictions."""
    from launcher.inspect_run import rebuild_report
    from launcher.summary import print_summary

    print_summary(rebuild_report(run_dir))


@cli.command(short_help="List runs, or compare two.")
@click.argument("action", type=click.Choice(["list", "diff"]), default="list")
@click.argument("names", nargs=-1, shell_complete=complete.runs)
@click.option("--output-dir", help="Folder that holds the runs; else that of the site file, else runs.")
def runs(action: str, names: tuple[str, ...], output_dir: str | None) -> None:
    """`runs list` shows the runs below a folder; `runs diff A B` compares settings and results of two."""
    from launcher.runs import output_folder, print_diff, print_list

    folder = output_folder(output_dir)
    if action == "diff":
        if len(names) != 2:
            raise click.UsageError("runs diff takes two runs: dist-train runs diff A B")
        print_diff(*names, output_dir=folder)
    else:
        print_list(folder)


@cli.command(short_help="Check this machine.")
def doctor() -> None:
    """Check Python, packages, GPUs, disk, network names and tracking, each with its fix."""
    from launcher.doctor import print_checks

    sys.exit(0 if print_checks() else 1)


@cli.command(short_help="List the shipped recipes, or a recipe's keys.")
@click.option("--keys", "keys_of", metavar="RECIPE", help="Print every key of this recipe with its value.")
@click.option("--schema", "schema_of", metavar="RECIPE", help="Print the JSON Schema of its files, for editors.")
def recipes(keys_of: str | None, schema_of: str | None) -> None:
    """List the shipped recipes with what each is for."""
    from launcher.recipes_list import print_keys, print_recipes, print_schema

    if keys_of:
        print_keys(keys_of)
    elif schema_of:
        print_schema(schema_of)
    else:
        print_recipes()


for _command in (*cli_studies.COMMANDS, *cli_jobs.COMMANDS):
    cli.add_command(_command)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; a failure becomes one clear block and its exit code."""
    make_output_steady()
    signal.signal(signal.SIGTERM, _interrupt)  # like Ctrl-C, until the ranks run
    try:
        cli.main(prog_name="dist-train", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ToolkitError as error:
        print(f"\n{error.title}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("\nstopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
