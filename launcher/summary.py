"""The last lines of a run: model against baselines, where everything is, and what to type next."""

from __future__ import annotations

from pathlib import Path

from dist_train.rundir import RunDir


def print_summary(run: RunDir) -> None:
    import json

    from dist_train.report import summary_table
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    report = json.loads(run.report_json.read_text())
    header, *rows = summary_table(report)
    table = Table(*header, title=f"{run.name}: test split, 95 % intervals", title_justify="left")
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
    shown = _short(run.path)
    for command in (
        f"dist-train run {shown}/config.yaml        # the same again, under a new name",
        f"dist-train resume {shown} train.stop_after_steps=null   # only after a staged run",
        f"dist-train runs diff {shown} OTHER_RUN",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
