"""The commands that look without training: plan and report."""

from __future__ import annotations

from dist_train import config_io
from dist_train.hardware import detect_hardware
from dist_train.plan import make_plan
from dist_train.recipe import load_recipe
from dist_train.report import build_report
from dist_train.rundir import RunDir
from dist_train.start_run import check_metric, kept_data, prepare_data, print_plan
from launcher.preflight import check_gpus, check_imports


def show_plan(recipe_name: str, overrides: list[str]) -> None:
    """Print every setting with its origin, then the plan. The data is read and prepared, nothing is started."""
    loaded = config_io.load(recipe_name, overrides)
    check_imports()
    print(config_io.dump(loaded.config, loaded.sources, loaded.config.name or "not named yet"))
    recipe = load_recipe(loaded.config.recipe)
    check_metric(loaded.config, recipe)
    facts = prepare_data(loaded.config, recipe)
    hardware = detect_hardware()
    plan = make_plan(loaded.config, hardware, facts["splits"]["train"]["rows"])
    check_gpus(plan, hardware)
    print_plan(None, plan)


def rebuild_report(path: str) -> RunDir:
    """Write the report of a run again from its kept predictions."""
    run = RunDir.existing(path)
    with run.locked():
        config = config_io.load_run_config(run)
        recipe = load_recipe(config.recipe)
        kept_data(run, config, recipe)
        build_report(run, recipe, config, print)
    return run
