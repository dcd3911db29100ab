"""dist-train ablate: the runs of a recipe's ladder over several seeds, one after the other, and their table.

A study is a folder of ordinary runs. Whatever ends it, the same command goes on: finished runs are kept, a run that was
broken off is resumed, one that another process is at is left to it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich import box
from rich.table import Table

from dist_train import config_io
from dist_train.ablation import Cell, Rung, compare_rungs, make_grid, parse_ladder, verdicts
from dist_train.config import RunConfig
from dist_train.errors import BusyError, ConfigError, Preempted, ToolkitError
from dist_train.recipe import load_recipe
from dist_train.rundir import RunDir, write_atomic, write_json
from dist_train.score import Score
from launcher import start
from launcher.process import start_detached
from launcher.summary import open_console


class Study:
    """The runs of a ladder, below one folder."""

    def __init__(self, recipe: str, settings: Sequence[str], seeds: int) -> None:
        self.recipe, self.settings = recipe, list(settings)
        config = config_io.load(recipe, self.settings).config
        self.rungs = parse_ladder(config)
        self.grid = make_grid(self.rungs, seeds, config.seed)
        name = config.name or f"{recipe.removesuffix('.yaml').strip('./').replace('/', '-')}-ablation"
        self.folder = config.output_dir / name
        self.score: Score = load_recipe(config.recipe).score
        self.samples = config.eval.bootstrap_samples
        # What is wrong with a rung is said before the first one runs.
        self.configs = {rung.name: self._config(rung) for rung in self.rungs}

    def words(self, cell: Cell) -> list[str]:
        """The settings of a run, as they would be typed."""
        placed = ["ladder=null", f"output_dir={self.folder}", f"name={cell.name}", f"seed={cell.seed}"]
        return [*self.settings, *cell.rung.settings, *placed]

    def run_of(self, cell: Cell) -> RunDir:
        return RunDir(self.folder / cell.name)

    def _config(self, rung: Rung) -> RunConfig:
        try:
            return config_io.load(self.recipe, [*self.settings, *rung.settings, "ladder=null"]).config
        except ConfigError as error:
            raise ConfigError(f"ladder: the rung {rung.name!r}: {error}", "ladder") from error


def ablate(recipe: str, settings: list[str], seeds: int, only: int | None, is_list: bool, is_background: bool) -> int:
    """Run what is missing, print the table. Returns the exit code: that of the first run that failed, else 0."""
    study = Study(recipe, settings, seeds)
    if is_list:
        for cell in study.grid:
            print(f"{cell.index:3d}  {cell.name:40s} {' '.join(cell.rung.settings)}")
        return 0
    if only is not None and not 0 <= only < len(study.grid):
        raise ConfigError(f"--only is {only}, but this study has the runs 0 to {len(study.grid) - 1} (--list).")
    if is_background:
        _start_in_background(study, recipe, settings, seeds, only)
        return 0
    failed: dict[str, ToolkitError] = {}
    cells = study.grid if only is None else [study.grid[only]]
    for cell in cells:
        print(f"\n== run {cell.index + 1} of {len(study.grid)}: {cell.rung.name}, seed {cell.seed} ==", flush=True)
        try:
            _bring_to_its_end(study, cell)
        except Preempted as error:
            again = shlex.join(["dist-train", "ablate", recipe, *settings, "--seeds", str(seeds)])
            raise Preempted(f"{error}\nGo on with the study: {again}") from error
        except BusyError as error:
            print(f"left to the process that is at it: {error}", flush=True)
        except ToolkitError as error:
            failed[cell.name] = error
            print(f"{error.title}: {error}", file=sys.stderr, flush=True)
    _report(study, failed)
    return next(iter(failed.values())).exit_code if failed else 0


def _bring_to_its_end(study: Study, cell: Cell) -> None:
    run = study.run_of(cell)
    if not run.config.is_file():
        start.run(study.recipe, study.words(cell))
        return
    if not _is_of(study, cell):
        raise ConfigError(
            f"{run.path} is a run of other settings than this study's: give the study another name=..., or delete that "
            f"run. To see them: dist-train recipes --keys {study.recipe}, and {run.config}."
        )
    if run.report_json.is_file():
        print(f"kept           {run.path}", flush=True)
        return
    start.resume(str(run.path), [], [])


def _is_of(study: Study, cell: Cell) -> bool:
    """Whether the run that is there has the settings that this study asks for."""
    wanted = config_io.result_fingerprint(config_io.load(study.recipe, study.words(cell)).config)
    return _without_pins(config_io.load_run_config(study.run_of(cell)), wanted) == wanted


def _without_pins(known: RunConfig, wanted: str) -> str:
    """The fingerprint of a run's config; a commit that its start has looked up for a hub name is no other setting."""
    own = config_io.result_fingerprint(known)
    if own == wanted or not hasattr(known.model, "revision"):
        return own
    unpinned = known.model_copy(update={"model": known.model.model_copy(update={"revision": None})})
    return config_io.result_fingerprint(unpinned)


def _report(study: Study, failed: dict[str, ToolkitError]) -> None:
    tables = {}
    for cell in study.grid:
        run = study.run_of(cell)
        if run.report_json.is_file() and _is_of(study, cell):
            tables[cell.rung.name, cell.seed] = pq.read_table(run.prediction_file("test"))
    entries = compare_rungs(study.rungs, tables, study.score, study.samples)
    missing = [cell.name for cell in study.grid if (cell.rung.name, cell.seed) not in tables]
    sentences = verdicts(entries, study.score)
    note = (
        f"Test split. Differences: mean over seeds, with a 95 % interval over {study.samples} bootstrap samples of "
        f"{study.score.sampled}, paired, given these seeds; ± is the standard deviation over seeds."
    )
    study.folder.mkdir(parents=True, exist_ok=True)
    failures = {name: str(error) for name, error in failed.items()}
    summary = {"rungs": entries, "verdicts": sentences, "note": note, "missing": missing, "failed": failures}
    write_json(study.folder / "ablation.json", summary)
    rows = _rows(entries)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if rows:
        lines.insert(1, f"|{'---|' * len(rows[0])}")
    text = "\n".join(["# Ablation", "", *lines, "", note, "", *(f"- {sentence}" for sentence in sentences), ""])
    write_atomic(study.folder / "ablation.md", text)
    console = open_console()
    if rows:
        table = Table(*rows[0], title=f"{study.folder}: test split", title_justify="left", box=box.SIMPLE_HEAD)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for line in (*sentences, note):
        console.print(line, soft_wrap=True)
    if missing:
        console.print(f"Not there yet, or failed: {', '.join(missing)}", soft_wrap=True)
    console.print(f"\nkept in {study.folder / 'ablation.md'} and ablation.json", soft_wrap=True)


def _rows(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table: a header, and a line a rung with its metrics and their differences to the rung before."""
    if not entries:
        return []
    names = list(entries[0]["metrics"])
    rows = [["rung", "seeds", *(part for name in names for part in (name, "to the rung before"))]]
    for entry in entries:
        row = [entry["rung"], str(len(entry["seeds"]))]
        for name in names:
            point = entry["metrics"][name]
            spread = f" ± {point['std']:.4f}" if point["std"] is not None else ""
            row.append("not defined" if point["mean"] is None else f"{point['mean']:.4f}{spread}")
            value = entry.get("to_rung_before", {}).get("metrics", {}).get(name)
            known = value is not None and value["value"] is not None
            row.append(f"{value['value']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]" if known else "")
        rows.append(row)
    return rows


def _start_in_background(study: Study, recipe: str, settings: list[str], seeds: int, only: int | None) -> None:
    study.folder.mkdir(parents=True, exist_ok=True)
    log = Path(study.folder / "ablate.log").absolute()
    words = ["ablate", recipe, *settings, "--seeds", str(seeds), *(["--only", str(only)] if only is not None else [])]
    pid = start_detached([sys.executable, "-P", "-m", "launcher", *words], log)
    print(f"{len(study.grid)} runs go on in the background.")
    print(f"follow them:   tail -f {shlex.quote(str(log))}, or dist-train runs --output-dir {study.folder}")
    print(f"stop them:     kill -INT {pid}   (the step under way is saved; the same command goes on)")
