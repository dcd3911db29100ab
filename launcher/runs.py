"""The commands that look over many runs: list, and the differences of two."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from dist_train import config_io
from dist_train.errors import ConfigError, Preempted
from dist_train.events import read_lines
from dist_train.init_from import describe_start, started_from
from dist_train.report import show_interval
from dist_train.rundir import RunDir
from launcher.summary import open_console


def output_folder(given: str | None) -> str:
    """Where the runs lie: as given, else the site file's output_dir, else runs."""
    return given or config_io.site_output_dir() or "runs"


def print_list(output_dir: str) -> None:
    """One line a run: when it began, how far it came, how it ended, and its headline metrics."""
    runs = [RunDir(path.parent) for path in sorted(Path(output_dir).glob("*/config.yaml"))]
    if not runs:
        print(f"no runs below {Path(output_dir).absolute()}; another folder: dist-train runs --output-dir FOLDER")
        return
    table = Table("run", "started", "state", "step", "test result")
    for run in sorted(runs, key=_started):
        report = _read(run.report_json)
        names = report["headline"][:2] if report else []
        headline = [f"{name} {_point(report['metrics']['test'].get(name))}" for name in names]
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(_started(run)))
        table.add_row(run.name, started, _state(run), _progress(run), "  ".join(headline))
    open_console().print(table)


def print_diff(first: str, second: str, output_dir: str) -> None:
    """Settings, surroundings and results that differ between two runs, given as paths or as names below output_dir."""
    runs = [_find(name, output_dir) for name in (first, second)]
    sides = [_flat(run) for run in runs]
    table = Table("what differs", *(run.name for run in runs))
    for key in sorted({*sides[0], *sides[1]}):
        values = [str(side.get(key, "-")) for side in sides]
        if values[0] != values[1]:
            table.add_row(key, *values)
    labels = [_read(run.data_facts).get("labels", []) for run in runs]
    alone = [[label for label in side if label not in other] for side, other in (labels, labels[::-1])]
    if alone != [[], []]:
        table.add_row("labels of this run alone", *(", ".join(side) or "-" for side in alone))
    console = open_console()
    console.print(table if table.row_count else "settings, data and surroundings are the same")
    for run in runs:
        record = started_from(run)
        if record is not None:
            console.print(f"{run.name}:\n{describe_start(record)}", soft_wrap=True)
    reports = [_read(run.report_json) for run in runs]
    missing = [run.name for run, report in zip(runs, reports, strict=True) if not report]
    if missing:
        console.print(f"no report yet: {', '.join(missing)}")
        return
    results = Table("test split", *(run.name for run in runs))
    tests = [report["metrics"]["test"] for report in reports]
    for name in tests[0]:
        results.add_row(name, *(show_interval(test[name]) if name in test else "-" for test in tests))
    console.print(results)
    groups = [report.get("groups", {}).get("test", {}) for report in reports]
    for kind in {**groups[0], **groups[1]}:
        console.print(_group_table(kind, [side.get(kind, {}) for side in groups], runs))
    if sides[0]["data"] != sides[1]["data"]:
        console.print("The two were tested on different data or splits: their results cannot be compared row by row.")


def _group_table(kind: str, sides: list[dict[str, Any]], runs: list[RunDir]) -> Table:
    """The last metric and the rows of each class or other part, side by side; those of one run alone come last."""
    metric = list(next(iter((sides[0] or sides[1]).values())))[-1]
    table = Table(f"test split, {metric} by {kind}", *(column for run in runs for column in (run.name, "rows")))
    shared = [name for name in sides[0] if name in sides[1]]
    alone = [name for side, other in (sides, sides[::-1]) for name in side if name not in other]
    for name in [*shared, *alone]:
        cells: list[str] = []
        for side in sides:
            entry = side.get(name)
            cells.append(show_interval(entry[metric]) if entry and metric in entry else "-")
            cells.append(str(entry.get("rows", "-")) if entry else "-")
        table.add_row(name, *cells)
    return table


def _point(entry: dict[str, Any] | None) -> str:
    value = None if entry is None else entry["value"]
    return "not defined" if value is None else f"{value:.4f}"


def _find(name: str, output_dir: str) -> RunDir:
    for path in (Path(name), Path(output_dir) / name):
        if (path / "config.yaml").is_file():
            return RunDir(path)
    raise ConfigError(f"there is no run {name}, as a path or below {output_dir}: `dist-train runs` lists them.")


def _flat(run: RunDir) -> dict[str, Any]:
    """Settings, plan, data and surroundings of a run by dotted names."""
    flat = dict(config_io.flatten(config_io.load_run_config(run)))
    environment, plan, facts = _read(run.environment), _read(run.plan), _read(run.data_facts)
    flat["data"] = facts.get("fingerprint", "-")[:16]
    flat |= {f"plan.{key}": plan.get(key) for key in ("world_size", "steps", "precision", "strategy", "device")}
    flat |= {f"version.{name}": version for name, version in environment.get("versions", {}).items()}
    flat |= {"commit": environment.get("git"), "cpu": environment.get("hardware", {}).get("cpu")}
    return flat


def _state(run: RunDir) -> str:
    if run.is_locked():
        return "running"
    turns = ("run_started", "failed", "finished")
    events = list(read_lines(run.events))
    trained = {event["attempt"] for event in events if event["event"] == "run_started"}
    last = [event for event in events if event["event"] in turns and event.get("attempt") in trained]
    if not last:
        return "not started"
    name, code = last[-1]["event"], last[-1].get("code")
    # A start without an end whose lock is free: the launcher was killed.
    ends = {"run_started": "interrupted", "failed": "stopped" if code == Preempted.exit_code else f"failed ({code})"}
    return ends.get(name, name)


def _progress(run: RunDir) -> str:
    lines = [*read_lines(run.metrics), *read_lines(run.events)]
    step = max((int(line.get("step", 0)) for line in lines), default=0)
    return f"{step}/{_read(run.plan).get('steps', '?')}"


def _started(run: RunDir) -> float:
    return next((event["time"] for event in read_lines(run.events)), run.config.stat().st_mtime)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
