"""dist-train ablate: the runs of a recipe's ladder over several seeds, one after the other, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from dist_train import config_io
from dist_train.ablation import Rung, compare_rungs, make_grid, parse_ladder, verdicts
from dist_train.errors import ConfigError, ToolkitError
from dist_train.recipe import load_recipe
from dist_train.rundir import RunDir
from dist_train.score import Score
from launcher.study import Member, choose, print_list, run_in_background, run_members, study_folder, write_table


class Study:
    """The runs of a ladder."""

    def __init__(self, recipe: str, settings: Sequence[str], seeds: int) -> None:
        self.recipe, self.settings = recipe, list(settings)
        config = config_io.load(recipe, self.settings).config
        self.rungs = parse_ladder(config)
        self.cells = make_grid(self.rungs, seeds, config.seed)
        self.folder = study_folder(config, recipe, "ablation")
        self.score: Score = load_recipe(config.recipe).score
        self.samples = config.eval.bootstrap_samples
        # What is wrong with a rung is said before the first one runs.
        for rung in self.rungs:
            self._check(rung)
        self.members = [
            Member(
                cell.index,
                f"{cell.rung.name}, seed {cell.seed}",
                recipe,
                (*self.settings, *cell.rung.settings, "ladder=null", f"seed={cell.seed}"),
                RunDir(self.folder / cell.name),
            )
            for cell in self.cells
        ]

    def _check(self, rung: Rung) -> None:
        try:
            config_io.load(self.recipe, [*self.settings, *rung.settings, "ladder=null"])
        except ConfigError as error:
            raise ConfigError(f"ladder: the rung {rung.name!r}: {error}", "ladder") from error


def ablate(recipe: str, settings: list[str], seeds: int, only: int | None, is_list: bool, is_background: bool) -> int:
    """Run what is missing, print the table. Returns the exit code: that of the first run that failed, else 0."""
    study = Study(recipe, settings, seeds)
    if is_list:
        print_list(study.members)
        return 0
    chosen = choose(study.members, only)
    words = ["ablate", recipe, *settings, "--seeds", str(seeds)]
    again = [*words, *(["--only", str(only)] if only is not None else [])]
    if is_background:
        run_in_background(study.folder, again, len(chosen))
        return 0
    failed = run_members(chosen, len(study.members), again)
    _report(study, failed)
    return next(iter(failed.values())).exit_code if failed else 0


def _report(study: Study, failed: dict[str, ToolkitError]) -> None:
    tables = {}
    for cell, member in zip(study.cells, study.members, strict=True):
        if member.is_done:
            tables[cell.rung.name, cell.seed] = pq.read_table(member.run.prediction_file("test"))
    entries = compare_rungs(study.rungs, tables, study.score, study.samples)
    missing = [cell.name for cell in study.cells if (cell.rung.name, cell.seed) not in tables]
    sentences = verdicts(entries, study.score)
    note = (
        f"Test split. Differences: mean over seeds, with a 95 % interval over {study.samples} bootstrap samples of "
        f"{study.score.sampled}, paired, given these seeds; ± is the standard deviation over seeds."
    )
    if missing:
        print(f"\nNot there yet, or failed: {', '.join(missing)}")
    failures = {name: str(error) for name, error in failed.items()}
    summary = {"rungs": entries, "verdicts": sentences, "note": note, "missing": missing, "failed": failures}
    write_table(study.folder, "ablation", _rows(entries), sentences, note, summary)


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
