"""Several machines by hand: one launcher each, here two on one machine."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from dist_train.errors import ConfigError
from launcher import meeting
from launcher.meeting import Link, Meeting, call, free_port
from launcher.nodes import place_by_hand
from launcher.snapshot import snapshot
from slurm import client
from tests.front_door import TICKET_SETTINGS, final_shards, losses, start

ROOT = Path(__file__).parent.parent


def _pair(desk: Path, name: str, *others: str, under: tuple[str, ...] = (), **variables: str) -> list[tuple[int, str]]:
    """Exit code and output of node 0 and node 1; others, under and variables are node 1's alone."""
    head = f"localhost:{free_port()}"
    words = ["run", "ticket_routing", f"name={name}", *TICKET_SETTINGS, "--nodes", "2", "--gpus-per-node", "1"]
    # As many threads a rank as two ranks of one machine have: sums of floats depend on it.
    variables["OMP_NUM_THREADS"] = "1"
    nodes = [
        start([*words, "--head", head, "--node-rank", "0"], desk, OMP_NUM_THREADS="1"),
        start([*words, *others, "--head", head, "--node-rank", "1"], desk, under, **variables),
    ]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]


@pytest.mark.front_door
def test_two_machines_train_as_one_does(desk: Path) -> None:
    done = _pair(desk, "byhand")
    assert [code for code, _ in done] == [0, 0], done
    assert losses(desk / "runs" / "byhand") == losses(desk / "runs" / "whole2")
    assert final_shards(desk / "runs" / "byhand") == final_shards(desk / "runs" / "whole2")


@pytest.mark.front_door
def test_other_words_code_or_data_on_a_node_end_it_and_name_the_node(desk: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    done = _pair(desk, "words", "optim.lr=1")
    assert [code for code, _ in done] == [2, 2], done
    assert f"node 1 ({socket.gethostname()}) was started with other words than node 0" in done[0][1]

    for package in ("launcher", "dist_train", "slurm", "recipes"):
        shutil.copytree(ROOT / package, tmp_path / "checkout" / package)
    with open(tmp_path / "checkout" / "dist_train" / "loop.py", "a") as stream:
        stream.write("# edited\n")
    done = _pair(desk, "code", PYTHONPATH=str(tmp_path / "checkout"))
    assert [code for code, _ in done] == [2, 2], done
    assert f"node 1 ({socket.gethostname()}) has other code than node 0" in done[0][1]
    assert time.monotonic() - began < 60


@pytest.mark.front_door
def test_other_data_on_a_node_is_named(desk: Path, tmp_path: Path) -> None:
    """Node 1 sees another disk where the prepared data lies."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    shutil.copytree(desk / "prepared", tmp_path / "other")
    for facts in (tmp_path / "other").glob("*/facts.json"):
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "fingerprint": "0" * 64}))
    bound = f'mount --bind {tmp_path}/other {desk}/prepared; exec "$0" "$@"'
    done = _pair(desk, "data", under=("unshare", "-m", "sh", "-c", bound))
    assert done[0][0] == 2, done
    assert f"node 1 ({socket.gethostname()}) has other data than node 0" in done[0][1]


@pytest.mark.parametrize(
    ("nodes", "rank", "head", "said"),
    [
        (None, 0, "a:1", "need all of --nodes"),
        (2, None, "a:1", "need all of --nodes"),
        (2, 0, "a", "must be HOST:PORT"),
        (2, 0, "a:99999", "must be HOST:PORT"),
        (2, 2, "a:1", "have the ranks 0 to 1"),
    ],
)
def test_half_of_the_options_is_refused(nodes: int | None, rank: int | None, head: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        place_by_hand(nodes, rank, head)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(ConfigError, match="where the nodes are to meet"):
        Meeting(2, taken.getsockname()[1])


def test_a_node_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEETING_S", 1.0)
    head = Meeting(3, 0)
    link = call("localhost", head.port, {"node_rank": 2, "nodes": 3, "host": "n2"})
    with pytest.raises(ConfigError, match=r"node 1 of 3 did not come .* there are: 2 \(n2\)"):
        head.wait_for_all()
    head.close()
    assert link.receive(5) is None


def test_a_node_that_cannot_reach_the_first_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEETING_S", 1.0)
    hello = {"node_rank": 1, "nodes": 2, "host": "n1"}
    with pytest.raises(ConfigError, match="the name cannot be resolved"):
        call("no-such-host.invalid", 29400, hello)
    with pytest.raises(ConfigError, match="refused"):
        call("localhost", free_port(), hello)


def test_two_nodes_of_one_rank_are_refused() -> None:
    head = Meeting(2, 0)
    first = call("localhost", head.port, {"node_rank": 1, "nodes": 2, "host": "n1"})
    head.wait_for_all()
    second = call("localhost", head.port, {"node_rank": 1, "nodes": 2, "host": "n9"})
    answer = second.receive(5)
    assert answer is not None
    assert answer["message"] == "n9 has node rank 1, which n1 has already."
    head.close()
    first.close()


def test_a_node_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_SILENT_S", 1.0)
    with socket.create_server(("localhost", 0)) as silent:
        assert Link(socket.create_connection(silent.getsockname())).receive(5) is None


def test_noise_on_the_port_stops_nothing() -> None:
    head = Meeting(2, 0)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100 + b"\n", b'{"node_rank": "x"}\n'):
        with socket.create_connection(("localhost", head.port)) as stranger:
            stranger.sendall(noise)
    came = threading.Thread(target=lambda: call("localhost", head.port, {"node_rank": 1, "nodes": 2, "host": "n1"}))
    came.start()
    head.wait_for_all()
    came.join()
    head.close()


def test_a_snapshot_has_uncommitted_changes_and_not_what_git_ignores(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "mine").mkdir(parents=True)
    (project / "mine" / "task.py").write_text("committed = 1\n")
    (project / ".gitignore").write_text("*.bin\n")
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (project / "mine" / "task.py").write_text("changed = 1\n")
    (project / "mine" / "new.py").write_text("")
    (project / "weights.bin").write_bytes(b"0" * 100)
    facts = snapshot(tmp_path / "run" / "code", project / "mine") if (tmp_path / "run").mkdir() is None else {}
    copied = Path(facts["project"])
    assert copied == tmp_path / "run" / "code" / "project" / "mine"
    assert (copied / "task.py").read_text() == "changed = 1\n"
    assert (copied / "new.py").exists()
    assert not (copied.parent / "weights.bin").exists()
    assert facts["changed"]
    assert (tmp_path / "run" / "code" / "dist_train" / "loop.py").is_file()


def test_a_project_that_is_too_large_names_its_largest_files(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with open(tmp_path / "mine" / "weights.bin", "wb") as stream:
        stream.truncate(65 * 2**20)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"The largest: weights.bin \(65.0 MiB\)"):
        snapshot(tmp_path / "run" / "code", tmp_path / "mine")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("10", 10), ("10:30", 10), ("02:10:00", 130), ("1-02:00:00", 1560), ("UNLIMITED", 10**9), ("2-00", 2880)],
)
def test_times_of_slurm_are_read(text: str, minutes: int) -> None:
    assert client.minutes(text) == minutes
