"""What every node of a launch must have alike, and what it says when it has not."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from dist_train import prepared
from dist_train.config_io import load_run_config
from dist_train.errors import ConfigError
from dist_train.hardware import Hardware
from dist_train.recipe import code_fingerprint, load_recipe
from dist_train.rundir import RunDir, read_json
from dist_train.start_run import environment_facts

VISIBLE_S = 45.0
"""How long what node 0 has written may take to be seen elsewhere."""
_POLL_S = 0.2


def facts_of(run: RunDir) -> dict[str, Any]:
    """What every node must have alike."""
    is_recipe = run.config.is_file()
    plan = read_json(run.plan)
    facts: dict[str, Any] = {
        "world_size": plan["world_size"],
        "device": plan["device"],
        "processes_per_node": plan["processes_per_node"],
        "packages": _packages(),
        "plan": hashlib.sha256(run.plan.read_bytes()).hexdigest(),
        "config": hashlib.sha256(run.config.read_bytes()).hexdigest() if is_recipe else None,
    }
    if is_recipe:
        facts["code"] = code_fingerprint(load_recipe(load_run_config(run).recipe).source_files())
        facts["data"] = read_json(run.data_facts)["fingerprint"]
    else:
        script = Path(plan["command"][0])
        facts["code"] = code_fingerprint([script] if script.is_file() else [])
        facts["data"] = None
    return facts


def check(order: dict[str, Any], me: str, hardware: Hardware) -> None:
    """ConfigError for what this node, `me`, has otherwise than node 0 says; files may take a while to be visible."""
    run = RunDir(order["run"])
    deadline = time.monotonic() + VISIBLE_S
    while not _is_visible(run, order):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{me} cannot see {run.path} as node 0 has written it: output_dir must lie on a file system "
                "that all nodes share."
            )
        time.sleep(_POLL_S)
    have = facts_of(run)
    for name, what, cure in (
        ("world_size", "another world size", "start every node with the same --nodes and --gpus-per-node"),
        ("code", "other code", "install the same version of the toolkit and of the recipe on every node"),
        ("packages", "other packages", "use one environment on all nodes"),
        ("data", "other data", "prepare it where all nodes see it (data.cache_dir)"),
    ):
        if have[name] != order[name]:
            raise ConfigError(f"{me} has {what} than node 0 ({_difference(have[name], order[name])}): {cure}.")
    if have["data"] is not None:
        _check_prepared(run, have["data"], me, deadline)
    device = "cuda" if hardware.gpus else "cpu"
    if device != order["device"]:
        raise ConfigError(f"{me} would train on {device}, but node 0 on {order['device']}: they must be alike.")
    if hardware.gpus and len(hardware.gpus) < order["processes_per_node"]:
        raise ConfigError(
            f"{me} has {len(hardware.gpus)} GPUs, but the plan has {order['processes_per_node']} a node: lower "
            "parallel.processes_per_node (--gpus-per-node), or leave the node out."
        )


def _check_prepared(run: RunDir, fingerprint: str, me: str, deadline: float) -> None:
    folder = Path(read_json(run.data_facts)["folder"])
    while not prepared.is_whole(folder):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{me} cannot see the prepared data {folder}: data.cache_dir must lie on a file system that "
                "all nodes share."
            )
        time.sleep(_POLL_S)
    found = prepared.load_facts(folder)["fingerprint"]
    if found != fingerprint:
        raise ConfigError(
            f"{me} has other data than node 0 in {folder} (fingerprint {found[:12]}, there "
            f"{fingerprint[:12]}): data.cache_dir must be the same folder on all nodes."
        )


def _is_visible(run: RunDir, order: dict[str, Any]) -> bool:
    try:
        plan = hashlib.sha256(run.plan.read_bytes()).hexdigest()
        config = None if order["config"] is None else hashlib.sha256(run.config.read_bytes()).hexdigest()
    except OSError:
        return False
    return (plan, config) == (order["plan"], order["config"])


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = environment_facts(Hardware("", "", 1, 0.0), None, None)["versions"]
    return versions


def _difference(mine: Any, theirs: Any) -> str:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return ", ".join(
            f"{name} {mine[name]}, there {theirs.get(name)}" for name in mine if mine[name] != theirs.get(name)
        )
    return f"{str(mine)[:12]}, there {str(theirs)[:12]}"
