"""The last lines of a run: model against baselines, where everything is, and what to type next."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dist_train.config_io import load_run_config
from dist_train.report import summary_table
from dist_train.rundir import RunDir

# Off a terminal: wide enough that no table is cut or wrapped.
_PLAIN_WIDTH = 160


def open_console() -> Console:
    """For text as it is, with tables that fit the terminal."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_PLAIN_WIDTH)


def print_summary(run: RunDir, results: RunDir | None = None) -> None:
    """results: where report and predictions lie, if they are of another checkpoint than the best."""
    results = results or run
    console = open_console()
    report = json.loads(results.report_json.read_text())
    header, *rows = summary_table(report)
    title = f"{report['run']}: test split with 95 % intervals; differences are paired"
    table = Table(*(name.replace("_", " ") for name in header), title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [*report["verdicts"], *report["remarks"], *_training_line(report["training"]), ""]
    for name, path in (
        ("report", results.report_html),
        ("predictions", results.predictions),
        ("model folder", run.best),
        ("checkpoints", run.checkpoints),
        ("everything", run.path),
    ):
        lines.append(f"{name:13s}{path}")
    lines += ["", "next:", *(f"  {command}" for command in _next_commands(run))]
    for line in lines:
        console.print(line, soft_wrap=True)


def _training_line(training: dict[str, Any]) -> list[str]:
    if training["samples_per_s"] is None:
        return []  # no step was logged
    return [
        f"Trained {training['samples']:,} samples at {training['samples_per_s']:,.0f} a second; "
        f"{training['padding_share']:.1%} of the positions were padding."
    ]


def _next_commands(run: RunDir) -> list[str]:
    shown = shlex.quote(_short(run.path))
    commands = []
    if shutil.which("dist-train") is None:
        commands.append(f". {shlex.quote(str(Path(sys.prefix) / 'bin' / 'activate'))}  # puts dist-train on the path")
    if load_run_config(run).train.stop_after_steps is not None:
        commands.append(f"dist-train resume {shown} train.stop_after_steps=null  # train the rest of the schedule")
    commands.append(f"dist-train predict {shown} NEW.csv  # answers to rows like those that it was trained on")
    commands.append(f"dist-train run {shown}/config.yaml  # the same again, under a new name")
    commands.append(f"dist-train runs diff {shown} OTHER  # what differs from another run")
    if list(run.path.glob("wandb/offline-run-*")):
        commands.append(f"wandb sync {shown}/wandb/offline-run-*  # send the curves to W&B")
    return commands


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
