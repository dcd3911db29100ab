"""dist-train prepare, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.front_door import dist_train, write_tickets

pytestmark = pytest.mark.front_door
SETTINGS = ["data.path=tickets.csv", "data.label_column=queue", "data.cache_dir=prepared"]


def test_prepare_shows_what_the_data_holds_and_plan_finds_it(tmp_path: Path) -> None:
    write_tickets(tmp_path / "tickets.csv")
    done = dist_train(["prepare", "ticket_routing", *SETTINGS], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert shown["rows"] == "600, 3 labels"
    assert shown["splits"] == "train 417, validation 62, test 121 (stratified)"
    assert "groups crossing 0" in shown["leaks"]
    assert Path(shown["folder"]).parent == tmp_path / "prepared"
    assert shown["next"] == f"dist-train run ticket_routing {' '.join(SETTINGS)}"
    assert not (tmp_path / "runs").exists()
    again = dist_train(["prepare", "ticket_routing", *SETTINGS], tmp_path)
    assert f"prepared before: {shown['folder']}" in again.stdout


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["data.label_column=team"], 3, ["no column 'team'", "data.label_column"]),
        (["data.pth=tickets.csv"], 2, ["data.pth", "data.path"]),
        (["data.cache_dir=tickets.csv/cache"], 13, ["tickets.csv/cache", "data.cache_dir"]),
    ],
)
def test_prepare_refuses_with_the_exit_codes_of_a_run(
    tmp_path: Path, settings: list[str], code: int, words: list[str]
) -> None:
    write_tickets(tmp_path / "tickets.csv", 60)
    done = dist_train(["prepare", "ticket_routing", *SETTINGS, *settings], tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
