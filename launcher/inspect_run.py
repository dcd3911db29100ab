"""The command that writes a report again."""

from __future__ import annotations

from dist_train import config_io
from dist_train.recipe import load_recipe
from dist_train.report import build_report
from dist_train.rundir import RunDir
from dist_train.start_run import kept_data


def rebuild_report(path: str) -> RunDir:
    """Write the report of a run again from its kept predictions."""
    run = RunDir.existing(path)
    with run.locked():
        config = config_io.load_run_config(run)
        recipe = load_recipe(config.recipe)
        kept_data(run, config, recipe)
        build_report(run, recipe.score, config, print)
    return run
