"""dist-train backtest: a recipe trained up to several moments, each run tested on what came after, and how it ages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dist_train import config_io
from dist_train.errors import ConfigError
from dist_train.recipe import load_recipe
from dist_train.rundir import RunDir, write_atomic
from dist_train.start_run import prepare_data
from launcher.study import Member, choose, print_list, run_in_background, run_members, study_folder, write_table


def backtest(
    recipe_name: str,
    settings: list[str],
    cuts: int,
    tolerance: float,
    only: int | None,
    is_list: bool,
    is_background: bool,
) -> int:
    """Run what is missing, print the table. Returns the exit code: that of the first run that failed, else 0."""
    loaded = config_io.load(recipe_name, settings)
    config = loaded.config
    recipe = load_recipe(config.recipe)
    module = recipe.backtest
    if module is None:
        raise ConfigError(f"{recipe_name} cannot be tested back: its recipe has no backtest.py, as recsys has one.")
    facts = prepare_data(config, recipe, loaded.sources)
    planned = module.make_cuts(Path(facts["folder"]), config, cuts)
    folder = study_folder(config, recipe_name, "backtest")
    members = [
        Member(index, cut.title, recipe_name, (*settings, *cut.settings), RunDir(folder / cut.name))
        for index, cut in enumerate(planned)
    ]
    if is_list:
        print_list(members)
        return 0
    chosen = choose(members, only)
    words = ["backtest", recipe_name, *settings, "--cuts", str(cuts), "--tolerance", str(tolerance)]
    again = [*words, *(["--only", str(only)] if only is not None else [])]
    if is_background:
        run_in_background(folder, again, len(chosen))
        return 0
    failed = run_members(chosen, len(members), again)
    missing = [member.run.name for member in members if not member.is_done]
    if missing:
        # A model less would compare other periods.
        print(f"\nThe table is made when all runs are there. Missing: {', '.join(missing)}", flush=True)
        return next(iter(failed.values())).exit_code if failed else 0
    tables = {member.run.name: pq.read_table(member.run.prediction_file("test")) for member in members}
    result = module.compare_ages(planned, tables, recipe.score, config.eval.bootstrap_samples, tolerance)
    _report(folder, module, result)
    return 0


def _report(folder: Path, module: Any, result: dict[str, Any]) -> None:
    write_atomic(folder / "backtest.svg", module.figure(result).decode())
    note = (
        "Test split; 95 % intervals over bootstrap samples of users, given one training of each model, paired where "
        "two are compared."
    )
    write_table(
        folder, "backtest", module.table_rows(result), module.sentences(result), note, result, picture="backtest.svg"
    )
