"""dist-train run inside an allocation of Slurm (salloc): the ranks run on its nodes, wherever it is typed."""

from __future__ import annotations

import os
import socket
import sys

from dist_train import config_io
from dist_train.errors import ConfigError, error_for_code
from dist_train.events import read_lines
from dist_train.rundir import RunDir, read_json, write_json
from launcher.submit import make_run, wish_anywhere
from slurm import client
from slurm.allocation import read_allocation
from slurm.script import step_words

# The step in which some clusters run the shell of salloc.
_INTERACTIVE = str(0xFFFFFFFA)


def in_foreign_allocation() -> bool:
    """Whether there is an allocation that this process is no step of, of other machines or of several."""
    allocation = read_allocation()
    if allocation is None or not client.is_here():
        return False
    if os.environ.get("SLURM_STEP_ID", _INTERACTIVE) != _INTERACTIVE:
        return False
    host = socket.gethostname()
    here = {host, host.split(".")[0], os.environ.get("SLURMD_NODENAME")}
    return allocation.nodes > 1 or not here & set(client.host_names(allocation.node_names))


def run_in_allocation(recipe_name: str, overrides: list[str]) -> None:
    """Make the run, and train it on the nodes of the allocation: one srun, one launcher a node."""
    sys.exit(_step(recipe_name, overrides, ())[1])


def check_in_allocation(recipe_name: str, overrides: list[str], argument: str) -> RunDir:
    """As start.run_for_a_check, on the nodes of the allocation. Raises why it ended badly."""
    directory, code = _step(recipe_name, overrides, (argument,))
    if code != 0:
        told = [event for event in read_lines(directory.events) if event["event"] in ("attempt_failed", "failed")]
        raise error_for_code(code)(str(told[-1]["message"]) if told else f"srun ended with exit code {code}.")
    return directory


def _step(recipe_name: str, overrides: list[str], arguments: tuple[str, ...]) -> tuple[RunDir, int]:
    """arguments: for the ranks. Returns the run, and the exit code of its srun."""
    allocation = read_allocation()
    assert allocation is not None
    config = config_io.load(recipe_name, overrides).config
    if config.parallel.nodes > allocation.nodes:
        raise ConfigError(
            f"parallel.nodes is {config.parallel.nodes}, but the allocation {allocation.job_id} has "
            f"{allocation.nodes}: lower --nodes, or allocate more."
        )
    wish = wish_anywhere(config)
    directory = make_run(recipe_name, overrides, wish)
    if arguments:
        write_json(directory.planned, {**read_json(directory.planned), "arguments": list(arguments)})
    python = wish.slurm.python or sys.executable
    words = [*step_words(wish.nodes, wish.slurm), python, "-P", "-u", "-m", "launcher", "node", str(directory.path)]
    variables = {**os.environ, "PYTHONPATH": str(directory.code), "PYTHONSAFEPATH": "1"}
    return directory, client.run_step(words, variables)
