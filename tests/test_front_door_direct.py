"""Ranks that somebody else has started: accelerate launch, mpirun and torchrun with -m dist_train.worker RECIPE."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.front_door import dist_train, environment, lines, losses

pytestmark = pytest.mark.front_door

ROOT = Path(__file__).parent.parent
RECIPE = [
    "ticket_routing/demo",
    "data.rows=400",
    "data.cache_dir=prepared",
    "train.steps=3",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.feedforward=64",
    "eval.bootstrap_samples=100",
    "track.log_every_steps=1",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("direct")


def _start(words: list[str], desk: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Python with `words`, as from a user's shell."""
    variables = environment(desk, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", **extra)
    return subprocess.run(
        [sys.executable, *words], cwd=desk, env=variables, capture_output=True, text=True, timeout=300
    )


def _accelerate_file(desk: Path, **changes: object) -> str:
    """An Accelerate config with which its launcher starts two CPU ranks through Open MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (desk / "hostfile").write_text("localhost slots=2\n")
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_CPU",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
        "main_process_ip": "127.0.0.1",
        "main_process_port": port,
        "mpirun_config": {"mpirun_hostfile": "hostfile", "mpirun_ccl": "0"},
        **changes,
    }
    (desk / "mine.yaml").write_text(yaml.safe_dump(config))
    return "mine.yaml"


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI (apt-get install openmpi-bin)")
def test_accelerate_launch_trains_a_recipe_on_two_ranks_through_mpirun(desk: Path) -> None:
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launch = ["-m", "accelerate.commands.launch", "--config_file", _accelerate_file(desk), "-m", "dist_train.worker"]
    done = _start([*launch, *RECIPE, "name=mpi"], desk, **allowed)
    assert done.returncode == 0, done.stdout + done.stderr
    run = desk / "runs" / "mpi"
    assert f"done: {run}/report.html" in done.stderr
    assert "2 x cpu, ddp, fp32" in done.stdout
    assert (run / "report.html").is_file()
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    events = [line["event"] for line in lines(run / "events.jsonl")]
    assert (events.count("rank_started"), events.count("rank_finished"), events.count("finished")) == (2, 2, 1)
    assert "mpirun" in (run / "commands.sh").read_text()

    # What the file says against the recipe is refused with both places, and nothing is written.
    launch[3] = _accelerate_file(desk, mixed_precision="bf16")
    done = _start([*launch, *RECIPE, "train.precision=fp32", "name=other"], desk, **allowed)
    assert done.returncode != 0
    expected = "config error: ACCELERATE_MIXED_PRECISION is bf16, but train.precision is fp32 (command line): start"
    assert done.stderr.count(expected) == 1
    assert "Exit code:    2" in done.stderr
    assert "dist_train/worker.py" not in done.stderr
    assert not (desk / "runs" / "other").exists()

    # Our own launcher gives the same run.
    ours = dist_train(["run", *RECIPE, "name=ours", "parallel.processes_per_node=2"], desk)
    assert ours.returncode == 0, ours.stderr
    assert losses(desk / "runs" / "ours") == losses(run)


def test_torchrun_trains_a_recipe_under_zero_and_goes_on_with_it(desk: Path) -> None:
    (desk / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000}}))
    words = ["parallel.strategy=zero1", "parallel.deepspeed_config=ds.json", "name=zero", "train.stop_after_steps=2"]
    done = _start([*TORCHRUN, "-m", "dist_train.worker", *RECIPE, *words], desk)
    assert done.returncode == 0, done.stdout + done.stderr
    run = desk / "runs" / "zero"
    written = json.loads((run / "deepspeed.json").read_text())
    assert written["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    done = _start([*TORCHRUN, "-m", "dist_train.worker", "runs/zero", "train.stop_after_steps=null"], desk)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in lines(run / "metrics.jsonl") if line["split"] == "train"] == [1, 2, 3]
    assert {line["attempt"] for line in lines(run / "events.jsonl") if "attempt" in line} == {1, 2}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "usage: accelerate launch"),
        (["ticket_routin"], 2, "there is no recipe 'ticket_routin'. Did you mean ticket_routing?"),
        ([*RECIPE, "train.epoch=3"], 2, "command line: train.epoch is no known key. Did you mean train.epochs?"),
        ([*RECIPE, "parallel.processes_per_node=2"], 2, "is 2, but the launcher started 1 ranks"),
        ([*RECIPE, "data.path=nowhere.csv"], 3, "nowhere.csv"),
    ],
)
def test_errors_at_this_door_are_one_block_with_the_same_exit_code(
    words: list[str], code: int, message: str, desk: Path
) -> None:
    done = _start(["-m", "dist_train.worker", *words], desk)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_is_taken_is_refused_once_for_all_ranks(desk: Path) -> None:
    (desk / "runs" / "taken").mkdir(parents=True)
    done = _start([*TORCHRUN, "-m", "dist_train.worker", *RECIPE, "name=taken"], desk)
    assert done.returncode == 1  # torchrun's own, whatever a rank says
    assert done.stderr.count("run directory in use: the run") == 1
    assert "exitcode: 12" in done.stderr or "exitcode  : 12" in done.stderr
    assert "dist_train/worker.py" not in done.stderr
    assert os.listdir(desk / "runs" / "taken") == []
