"""dist-train run inside an allocation of Slurm (salloc): the ranks run on its nodes, wherever it is typed."""

from __future__ import annotations

import os
import socket
import sys

from dist_train import config_io
from dist_train.errors import ConfigError
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
    python = wish.slurm.python or sys.executable
    words = [*step_words(wish.nodes, wish.slurm), python, "-P", "-u", "-m", "launcher", "node", str(directory.path)]
    sys.exit(client.run_step(words, {**os.environ, "PYTHONPATH": str(directory.code), "PYTHONSAFEPATH": "1"}))
