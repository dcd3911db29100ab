"""What several test files make once and share."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.meeting import free_port
from tests.encoders import make_encoder
from tests.front_door import dist_train, run_tickets, write_tickets
from tests.slurm_jobs import LONG, SCRIPTS, missing_for_a_cluster

# Several workers share the cores: threads that wait for work are not to spin meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first, those that wait for processes and those that compute in turns: a worker that
    begins a long file at the end lets the others wait, and workers that all compute slow each other down."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(str(item.path), []).append(item)
    kinds: dict[str, list[list[pytest.Item]]] = {"waits": [], "computes": [], "short": []}
    for own in files.values():
        marks = {mark.name for item in own for mark in item.iter_markers()}
        kind = "waits" if {"cluster", "front_door"} & marks else "computes" if "ranks" in marks else "short"
        kinds[kind].append(own)
    longest = itertools.zip_longest(kinds["waits"], kinds["computes"], fillvalue=[])
    items[:] = itertools.chain(*itertools.chain(*longest), *kinds["short"])


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with a slurm/ and a recipes/ of its own, and the uninterrupted runs on 2 and 4 ranks."""
    folder = tmp_path_factory.mktemp("desk")
    write_tickets(folder / "tickets.csv")
    for name in ("slurm", "recipes"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own package was imported')")
    for ranks in (2, 4):
        done = dist_train([*run_tickets(f"whole{ranks}", ranks), "train.profile=2"], folder)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / f"whole{ranks}.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with a tokenizer for the tickets of `write_tickets`."""
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder with tickets, on a login node of the cluster."""
    missing = missing_for_a_cluster()
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    done = subprocess.run(
        [SCRIPTS / "up.sh", folder],
        env={**os.environ, "CLUSTER_PORT": str(free_port())},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 0:
        subprocess.run([SCRIPTS / "down.sh", folder], check=True, timeout=60)
        pytest.fail(f"the local cluster did not start: {done.stderr.strip()[-300:]}")
    desk = tmp_path_factory.mktemp("desk")
    write_tickets(desk / "tickets.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
        # One thread a rank, on one node as on two: sums of floats depend on it.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield desk
    subprocess.run([SCRIPTS / "down.sh", folder], check=True, timeout=60)


@pytest.fixture(scope="module")
def whole(cluster: Path) -> Path:
    """The run of two ranks of one machine that nothing has interrupted."""
    done = dist_train(["run", "ticket_routing", *LONG, "name=whole", "parallel.processes_per_node=2"], cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    return cluster / "runs" / "whole"
