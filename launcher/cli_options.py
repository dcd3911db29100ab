"""What several commands of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

STRATEGIES = ["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp"]


def study_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those of the commands that make several runs."""
    for option in (
        click.option("--background", "is_background", is_flag=True, help="Go on without this terminal."),
        click.option("--list", "is_list", is_flag=True, help="List the runs with their indices, and start none."),
        click.option("--only", type=int, metavar="INDEX", help="Run this one alone, as in a Slurm array."),
    ):
        command = option(command)
    return command


def all_settings(settings: tuple[str, ...], flags: dict[str, Any], debug: bool = False) -> list[str]:
    """The settings as they were typed, with those that a flag is short for. The later one of a key counts."""
    keys = {
        "nodes": "parallel.nodes",
        "gpus_per_node": "parallel.processes_per_node",
        "strategy": "parallel.strategy",
        "gpu_ids": "parallel.gpu_ids",
    }
    given = {keys[name]: value for name, value in flags.items() if value is not None}
    short = [f"{key}=[{value}]" if key == "parallel.gpu_ids" else f"{key}={value}" for key, value in given.items()]
    return [*(["parallel.processes_per_node=1"] if debug else []), *settings, *short]
