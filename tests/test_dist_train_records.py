"""Rows to predict: files that a table names, and images below a folder, are those that the training would find."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.records import read_records


def test_files_of_a_table_lie_beside_it_wherever_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "parts.csv").write_text(f"file,note\na/1.png, x\n {tmp_path}/2.png ,y\n,z\n")
    monkeypatch.chdir(tmp_path)
    rows = [row for chunk in read_records("sent/parts.csv", ("file", "image")) for row in chunk]
    assert [row["file"] for row in rows] == ["sent/a/1.png", f"{tmp_path}/2.png", ""]
    assert [row["note"].strip() for row in rows] == ["x", "y", "z"]
    spooled = [row for chunk in read_records("sent/parts.csv", ("file",), str(tmp_path)) for row in chunk]
    assert spooled[0]["file"] == f"{tmp_path}/a/1.png"
    assert next(read_records("sent/parts.csv"))[0]["file"] == "a/1.png"


def test_a_folder_gives_every_image_that_training_would_take_and_no_hidden_one(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/1.jfif", "a/2.pgm", ".hidden.png", ".cache/3.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    rows = [row for chunk in read_records(str(tmp_path)) for row in chunk]
    assert [row["id"] for row in rows] == ["a/1.jfif", "a/2.pgm", "b.PNG"]
    assert [len(chunk) for chunk in read_records(str(tmp_path), chunk_rows=2)] == [2, 1]
    assert rows[0]["path"] == f"{tmp_path}/a/1.jfif"
