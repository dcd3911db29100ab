"""Answers of a trained model: from the command line, from Python, from a folder that was moved."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

import dist_train as toolkit
from dist_train.errors import ConfigError, DataError, StorageError
from tests.front_door import WORDS, alive, dist_train, environment, start, write_tickets

pytestmark = pytest.mark.front_door


@pytest.fixture(scope="module")
def new(desk: Path) -> list[dict[str, str]]:
    """Five thousand new tickets, of several chunks."""
    with open(write_tickets(desk / "new.csv", 5000, seed=1)) as stream:
        return list(csv.DictReader(stream))


def _predict(desk: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return dist_train(["predict", *words], desk, **options)


def _read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_one_and_two_processes_and_python_give_the_same_answers(desk: Path, new: list[dict[str, str]]) -> None:
    one = _predict(desk, "runs/whole2", "new.csv")
    assert one.returncode == 0, one.stderr
    assert "5,000 rows in" in one.stderr
    two = _predict(desk, "runs/whole2", "new.csv", "--gpus-per-node", "2")
    assert two.stdout == one.stdout
    answers = _read(one.stdout)
    assert [int(answer["row"]) for answer in answers] == list(range(5000))
    assert {answer["decision"] for answer in answers} <= {"route", "review"}
    names = [f"probability/{name}" for name in sorted(WORDS)]
    assert list(answers[0]) == ["row", "predicted", "confidence", "decision", *names]

    own = toolkit.load(str(desk / "runs" / "whole2")).predict(new[100:160])
    for mine, theirs in zip(own, answers[100:160], strict=True):
        assert mine["predicted"] == theirs["predicted"]
        for name in ("confidence", *names):
            assert mine[name] == pytest.approx(float(theirs[name]), abs=1e-6)
    hits = sum(answer["predicted"] == row["queue"] for answer, row in zip(answers, new, strict=True))
    assert hits > 0.5 * len(new)


def test_many_rows_at_once_are_faster_than_one_by_one(desk: Path, new: list[dict[str, str]]) -> None:
    predictor = toolkit.load(str(desk / "runs" / "whole2"))
    predictor.predict(new[:10])
    began = time.perf_counter()
    together = predictor.predict(new[:1000])
    many = time.perf_counter() - began
    began = time.perf_counter()
    alone = [predictor.predict([row])[0] for row in new[:200]]
    single = (time.perf_counter() - began) * 5
    assert single >= 5 * many
    for one, other in zip(alone, together, strict=False):
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-6)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".csv"])
def test_answers_go_to_a_file_whole_and_keep_the_rows_ids(
    desk: Path, new: list[dict[str, str]], ending: str, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({**row, "id": f"T{i}"}) + "\n" for i, row in enumerate(new[:7]))
    )
    out = tmp_path / f"deep/answers{ending}"
    done = _predict(desk, "runs/whole2/best", str(tmp_path / "in.jsonl"), "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    if ending == ".parquet":
        answers = pq.read_table(out).to_pylist()
    elif ending == ".jsonl":
        answers = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        answers = _read(out.read_text())
    assert [answer["id"] for answer in answers] == [f"T{index}" for index in range(7)]
    assert os.listdir(out.parent) == [out.name]


def test_rows_without_an_id_among_rows_with_one_have_an_empty_one(desk: Path, tmp_path: Path) -> None:
    with open(tmp_path / "mixed.jsonl", "w") as stream:
        for index in range(2100):
            stream.write(
                json.dumps({"id": index, "text": "vpn"} if index < 2048 or index % 2 else {"text": "vpn"}) + "\n"
            )
    done = _predict(desk, "runs/whole2", str(tmp_path / "mixed.jsonl"))
    assert done.returncode == 0, done.stderr
    answers = _read(done.stdout)
    assert [answer["id"] for answer in answers[2046:2052]] == ["2046", "2047", "", "2049", "", "2051"]
    assert len({len(answer) for answer in answers}) == 1


def test_code_in_a_model_folder_is_refused_and_not_run(desk: Path, new: list[dict[str, str]], tmp_path: Path) -> None:
    evil = tmp_path / "model"
    shutil.copytree(desk / "runs" / "whole2" / "best", evil)
    text = (evil / "recipe.yaml").read_text()
    (evil / "recipe.yaml").write_text(text.replace("recipe: ticket_routing", "recipe: ./"))
    (evil / "task.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    done = _predict(desk, str(evil), "new.csv")
    assert done.returncode == 4, done.stderr
    assert "holds Python code, task.py" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_damaged_model_folder_is_named(desk: Path, new: list[dict[str, str]], tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(desk / "runs" / "whole2" / "best", broken)
    with open(broken / "model.safetensors", "r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(StorageError, match="is damaged"):
        toolkit.load(str(broken))


def test_standard_input_is_answered_as_csv_or_as_json_lines(desk: Path, new: list[dict[str, str]]) -> None:
    texts = [row["text"] for row in new[:3]]
    given = {"csv": "text\n" + "\n".join(texts), "jsonl": "\n".join(json.dumps({"text": text}) for text in texts)}
    outputs = []
    for text in given.values():
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "predict", "runs/whole2", "-"],
            cwd=desk,
            env=environment(desk, PYTHONPATH=str(Path(__file__).parent.parent)),
            input=text,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert len(_read(outputs[0])) == 3


def test_a_model_folder_that_was_moved_still_answers(desk: Path, new: list[dict[str, str]], tmp_path: Path) -> None:
    before = toolkit.load(str(desk / "runs" / "whole2")).predict(new[:5])
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(desk / "runs" / "whole2" / "best", moved)
    # Nothing of where it was made is needed.
    code = f"import dist_train, json; print(json.dumps(dist_train.load({str(moved)!r}).predict({new[:5]!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path, PYTHONPATH=str(Path(__file__).parent.parent)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == before


def test_the_documented_reader_needs_torch_and_safetensors_alone(
    desk: Path, new: list[dict[str, str]], tmp_path: Path
) -> None:
    root = Path(__file__).parent.parent
    reader = (root / "docs" / "model_folder.md").read_text().split("```python\n")[1].split("```")[0]
    shutil.copy(root / "recipes" / "ticket_routing" / "encoder.py", tmp_path)
    best = desk / "runs" / "whole2" / "best"
    use = f"""
import sys
assert not any(name.split(".")[0] in ("dist_train", "transformers", "pydantic") for name in sys.modules)
from tokenizers import Tokenizer
encoder, labels, decision = load_encoder({str(best)!r})
tokens = Tokenizer.from_file({str(best / "tokenizer.json")!r}).encode({new[0]["text"]!r}).ids
print(json.dumps(dict(zip(labels, probabilities(encoder, decision, tokens).tolist(), strict=True))))
"""
    (tmp_path / "service.py").write_text(reader + use)
    done = subprocess.run([sys.executable, "service.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = toolkit.load(str(best)).predict(new[:1])[0]
    for name, probability in json.loads(done.stdout).items():
        assert probability == pytest.approx(answer[f"probability/{name}"], abs=1e-6)


def test_the_model_folder_says_what_was_measured_and_what_it_decides(desk: Path) -> None:
    best = desk / "runs" / "whole2" / "best"
    record = json.loads((best / "dist_train.json").read_text())
    assert set(record["decision"]) == {"temperature", "threshold", "target_accuracy"}
    assert set(record["fingerprints"]) == {"code", "data", "config"}
    report = json.loads((desk / "runs" / "whole2" / "report.json").read_text())
    card = (best / "README.md").read_text()
    entry = report["metrics"]["test"]["macro_f1"]
    assert f"| macro_f1 | {entry['value']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}] |" in card
    assert str(record["decision"]["temperature"]) in card
    assert oct((best / "model.safetensors").stat().st_mode)[-3:] == "644"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["runs/whole2", "moved.csv"], 3, "no column 'text'"),
        (["runs/whole2", "nowhere.csv"], 3, "nowhere.csv"),
        (["runs/whole2", "empty.csv"], 3, "header"),
        (["runs", "new.csv"], 2, "neither a run directory nor a model folder"),
        (["runs/whole2", "new.csv", "--output", "answers.txt"], 2, "must end in one of .csv, .jsonl, .parquet"),
        (["runs/whole2", "new.csv", "--output", "tickets.csv/deep/answers.csv"], 13, "cannot be written"),
    ],
)
def test_what_cannot_be_answered_is_one_block_and_writes_nothing(
    desk: Path, new: list[dict[str, str]], words: list[str], code: int, message: str
) -> None:
    (desk / "moved.csv").write_text("subject,queue\nhello,network\n")
    (desk / "empty.csv").write_text("text\n")
    done = _predict(desk, *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (desk / "answers.txt").exists()


def test_answers_that_cannot_be_written_are_an_error(desk: Path, new: list[dict[str, str]]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "predict", "runs/whole2", "new.csv"],
            cwd=desk,
            env=environment(desk, PYTHONPATH=str(Path(__file__).parent.parent)),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 13
    assert "could not be written to standard output: No space left on device" in done.stderr


def test_ctrl_c_leaves_no_process_and_no_file(desk: Path, new: list[dict[str, str]]) -> None:
    process = start(["predict", "runs/whole2", "new.csv", "--output", "stopped.csv", "--gpus-per-node", "2"], desk)
    deadline = time.monotonic() + 30
    # Both are there, and no longer a copy of the one that starts them.
    children: list[psutil.Process] = []
    while sum("dist_train.predict" in child.cmdline() for child in children) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not any(alive(child.pid) for child in children)
    assert not [name for name in os.listdir(desk) if "stopped" in name]


def test_python_says_what_is_wrong_with_rows(desk: Path) -> None:
    predictor = toolkit.load(str(desk / "runs" / "whole2"))
    with pytest.raises(DataError, match="no column 'text'"):
        predictor.predict([{"subject": "x"}])
    with pytest.raises(ConfigError, match="neither a run directory"):
        toolkit.load(str(desk))
    assert predictor.predict([]) == []
    assert len(predictor.predict([{"text": 123}, {"text": float("nan")}, {"text": None}])) == 3
