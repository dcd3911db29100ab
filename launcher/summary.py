"""The last lines of a run: model against baselines, where everything is, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dist_train.rundir import RunDir


def print_summary(run: RunDir) -> None:
    import json

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dist_train.report import summary_table

    console = Console(highlight=False)
    report = json.loads(run.report_json.read_text())
    header, *rows = summary_table(report)
    title = f"{run.name}: test split with 95 % intervals; differences are paired"
    table = Table(*(name.replace("_", " ") for name in header), title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in report["verdicts"]:
        console.print(line, markup=False)
    console.print()
    for name, path in (
        ("report", run.report_html),
        ("model folder", run.best),
        ("checkpoints", run.checkpoints),
        ("predictions", run.predictions),
        ("everything", run.path),
    ):
        console.print(f"{name:13s}{path}", markup=False, soft_wrap=True)
    console.print("\nnext:", markup=False)
    for command in _next_commands(run, report):
        console.print(f"  {command}", markup=False, soft_wrap=True)


def _next_commands(run: RunDir, report: dict[str, Any]) -> list[str]:
    shown = shlex.quote(_short(run.path))
    commands = [
        f"dist-train run {shown}/config.yaml  # the same again, under a new name",
        f"dist-train runs diff {shown} OTHER  # what differs from another run",
    ]
    if list(run.path.glob("wandb/offline-run-*")):
        commands.append(f"wandb sync {shown}/wandb/offline-run-*  # send the curves to W&B")
    if report["training"]["last_step"] < report["plan"]["steps"]:
        commands.insert(0, f"dist-train resume {shown} train.stop_after_steps=null  # train the rest of the schedule")
    return commands


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
