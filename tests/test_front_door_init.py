"""A newcomer's path, as the README words it: init on a file, run, predict; and init on files of other kinds."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.front_door import dist_train, write_tickets

pytestmark = pytest.mark.front_door

ROOT = Path(__file__).parent.parent
CLINC = ROOT.parent / "shared" / "data" / "clinc150"


def _path_of_a_newcomer() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Your own data in ten minutes")[1]
    return [line for line in re.findall(r"```\n(.*?)```", section, re.DOTALL)[0].splitlines() if "dist-train" in line]


@pytest.mark.skipif(not CLINC.is_dir(), reason="needs the data sets beside the project (../shared/data)")
def test_a_newcomers_path_works_word_for_word(tmp_path: Path) -> None:
    shutil.copy(CLINC / "train.csv", tmp_path / "tickets.csv")
    with open(CLINC / "test.csv") as stream, open(tmp_path / "new.csv", "w", newline="") as out:
        rows = list(csv.DictReader(stream))[:300]
        writer = csv.writer(out)
        writer.writerows([["text"], *([row["text"]] for row in rows)])
    commands = _path_of_a_newcomer()
    assert [command.split()[1] for command in commands] == ["init", "run", "predict"]
    outputs = []
    for command in commands:
        # Five hundred steps of a small model are enough for the test; the whole takes minutes.
        quick = ["train.steps=500", "train.epochs=null", "optim.lr=5e-3", "eval.bootstrap_samples=100"]
        done = dist_train([*shlex.split(command)[1:], *(quick if " run " in command else [])], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout + done.stderr)
    init, run, predict = outputs
    assert "label_column: intent  # 151 classes, from 100 rows" in init
    assert "text_columns: [text]" in init
    assert "dist-train run routing/recipe.yaml name=routing" in init
    assert "15100 rows" in run or "15100 tickets in 151 classes" in run
    assert re.search(r"model +0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]", run)
    assert f"report       {tmp_path}/runs/first/report.html" in run
    assert "dist-train predict runs/first NEW.csv" in run
    assert "300 rows in" in predict
    with open(tmp_path / "answers.csv") as stream:
        answers = list(csv.DictReader(stream))
    right = sum(answer["predicted"] == row["intent"] for answer, row in zip(answers, rows, strict=True))
    assert right > 60  # of 300, among 151 classes


def test_init_finds_label_text_id_and_time_and_writes_what_plan_reads(tmp_path: Path) -> None:
    write_tickets(tmp_path / "plain.csv", rows=300)
    with open(tmp_path / "plain.csv") as stream, open(tmp_path / "t.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["ticket_id", "created_at", "subject", "body", "queue", "priority"])
        for index, row in enumerate(csv.DictReader(stream)):
            day = f"2026-{1 + index // 28 % 12:02d}-{1 + index % 28:02d}T08:00:00"
            writer.writerow([f"T{index}", day, row["text"][:30], row["text"], row["queue"], index % 3])
    done = dist_train(["init", "mine", "--data", "t.csv"], tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "mine" / "recipe.yaml").read_text()
    for line in (
        "path: ../t.csv",
        "text_columns: [subject, body]",
        "label_column: queue",
        "id_column: ticket_id",
        "time_column: created_at",
        "epochs: 40",
    ):
        assert line in text
    planned = dist_train(["plan", "mine", "data.cache_dir=prepared"], tmp_path)
    assert planned.returncode == 0, planned.stderr
    again = dist_train(["init", "mine", "--data", "t.csv"], tmp_path)
    assert again.returncode == 12
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("content", "words", "code", "message"),
    [
        ("a,b\n1.5,2.5\n2.5,3.1\n", [], 2, "no column looks like labels: name it with --label COLUMN"),
        ("text,x\nhello there you,1\nhow are you,2\n", ["--label", "queue"], 2, "--label is queue, but the file has"),
        ("", [], 3, "is empty"),
    ],
)
def test_init_says_what_it_cannot_tell(content: str, words: list[str], code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(content)
    done = dist_train(["init", "mine", "--data", "t.csv", *words], tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert not (tmp_path / "mine").exists()


def test_a_label_in_a_comment_cannot_break_the_file(tmp_path: Path) -> None:
    with open(tmp_path / "t.jsonl", "w") as stream:
        for index in range(40):
            row = {"the text": f"words {index} of some ticket", "label": f"a\nrecipe: {index % 2}: #x"}
            stream.write(json.dumps(row) + "\n")
    done = dist_train(["init", "mine", "--data", "t.jsonl"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "text_columns: [the text]" in (tmp_path / "mine" / "recipe.yaml").read_text()
