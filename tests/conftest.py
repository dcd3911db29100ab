"""What several test files make once and share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.encoders import make_encoder
from tests.front_door import dist_train, run_tickets, write_tickets

# Several workers share the cores: threads that wait for work are not to spin meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with a slurm/ and a recipes/ of its own, and the uninterrupted runs on 2 and 4 ranks."""
    folder = tmp_path_factory.mktemp("desk")
    write_tickets(folder / "tickets.csv")
    for name in ("slurm", "recipes"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own package was imported')")
    for ranks in (2, 4):
        done = dist_train(run_tickets(f"whole{ranks}", ranks), folder)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / f"whole{ranks}.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with a tokenizer for the tickets of `write_tickets`."""
    return make_encoder(tmp_path_factory.mktemp("encoder") / "bert")
