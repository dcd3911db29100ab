"""Recommendation as a user runs it: a log to a report, lists for new sessions, the same on two ranks."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import dist_train as toolkit
from recipes.recsys.measures import measure_lists
from tests.front_door import assert_refused, dist_train, final_shards, losses, rank_pids, start, wait_for_step
from tests.sessions import SETTINGS, write_log, write_rows

pytestmark = pytest.mark.front_door

TRAINING = ("train.epochs=6", "optim.lr=1e-2", "eval.batch_size=16")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a log and a run over it."""
    folder = tmp_path_factory.mktemp("shop")
    write_log(folder, users=200)
    done = dist_train(["run", "recsys", "name=first", *SETTINGS, *TRAINING], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_report_holds_the_model_against_every_baseline_and_has_buckets(shop: Path) -> None:
    report = json.loads((shop / "runs" / "first" / "report.json").read_text())
    assert set(report["baselines"]) == {"popularity", "item_knn", "rules", "ease"}
    assert set(report["groups"]["test"]) == {"frequency", "history", "user", "age"}
    assert any("beats the popularity baseline" in sentence for sentence in report["verdicts"])
    assert "0" in report["groups"]["test"]["frequency"]
    html = (shop / "runs" / "first" / "report.html").read_text()
    for title in ("Quality by bucket", "Age of the model", "Coverage", "Some sessions"):
        assert title in html


def test_the_metrics_do_not_depend_on_the_number_of_ranks(shop: Path) -> None:
    words = ["run", "recsys", "name=two", *SETTINGS, *TRAINING, "parallel.processes_per_node=2"]
    done = dist_train(words, shop)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = [pq.read_table(shop / "runs" / name / "predictions" / "test.parquet") for name in ("first", "two")]
    assert tables[0]["row"].equals(tables[1]["row"])
    values = [measure_lists(table)(np.ones(table.num_rows)) for table in tables]
    for metric in ("ndcg", "map", "hit_rate", "mrr"):
        assert values[0][metric] == pytest.approx(values[1][metric], abs=1e-3)


def test_new_sessions_get_lists_with_scores(shop: Path) -> None:
    rows: list[tuple[object, ...]] = [("item1 item9", "100 900"), ("", ""), ("nothing item3", "5 6")]
    write_rows(shop / "new.csv", ("history", "times"), rows)
    done = dist_train(["predict", "runs/first", "new.csv", "--output", "lists.csv"], shop)
    assert done.returncode == 0, done.stderr
    with open(shop / "lists.csv", newline="") as stream:
        answers = [json.loads(row["items"]) for row in csv.DictReader(stream)]
    assert [len(answer) for answer in answers] == [20, 20, 20]
    told = toolkit.load(shop / "runs" / "first").predict([{"history": "item1 item9", "times": "100 900"}])
    assert told[0]["items"] == answers[0]
    assert np.all(np.diff(told[0]["scores"]) <= 0)


def test_without_rules_a_score_is_the_product_of_state_and_item_vector(shop: Path) -> None:
    table = pq.read_table(shop / "runs" / "first" / "best" / "item_embeddings.parquet")
    assert len(table.schema.metadata[b"version"]) == 16
    vectors = np.array(table["embedding"].to_pylist())
    names = table["item_id"].to_pylist()
    answer = toolkit.load(_network_of(shop / "runs" / "first" / "best")).predict(
        [{"history": "item1"}, {"history": "item2"}]
    )
    # The scores of more items than the vectors have dimensions lie in the space that the vectors span.
    for each in answer:
        chosen = vectors[[names.index(item) for item in each["items"]]]
        state, *_ = np.linalg.lstsq(chosen, np.array(each["scores"]), rcond=None)
        np.testing.assert_allclose(chosen @ state, each["scores"], atol=1e-3)


def test_a_history_that_is_no_list_is_named(shop: Path) -> None:
    write_rows(shop / "bad.csv", ("history",), [('["item1", ',)])
    done = dist_train(["predict", "runs/first", "bad.csv"], shop)
    assert done.returncode == 3, done.stderr
    assert "begins like a JSON list" in done.stderr
    assert "Traceback" not in done.stderr


def test_items_that_come_after_the_training_are_recommended_by_their_content(shop: Path) -> None:
    # As much like the drills that the log knows as can be, and a lamp with a new price.
    rows: list[tuple[object, ...]] = [("fresh", "drill size 3", "kind2", 4), ("item6", "lamp size 0", "kind6", 9)]
    write_rows(shop / "fresh.csv", ("item_id", "title", "kind", "price"), rows)
    done = dist_train(["add-items", "runs/first", "fresh.csv", "--output", "with-fresh"], shop)
    assert done.returncode == 0, done.stderr
    assert "1 added, 1 with new content; 61 in the catalogue" in done.stdout
    folders = [shop / name for name in ("runs/first/best", "with-fresh")]
    before, after = (toolkit.load(folder) for folder in folders)
    sessions = [{"history": f"item{8 * size + 2} item{8 * size + 10}"} for size in range(3)]
    assert any("fresh" in answer["items"] for answer in after.predict(sessions))
    # Probabilities go down where there are more items; what the network says of the others stays.
    old, new = (toolkit.load(_network_of(folder)).predict(sessions) for folder in folders)
    for was, now in zip(old, new, strict=True):
        known = [pair for pair in zip(now["items"], now["scores"], strict=True) if pair[0] not in ("fresh", "item6")]
        then = dict(zip(was["items"], was["scores"], strict=True))
        for item, score in known:
            assert item not in then or score == pytest.approx(then[item], abs=1e-5)
    tables = [pq.read_table(folder / "item_embeddings.parquet") for folder in folders]
    assert [table.num_rows for table in tables] == [60, 61]
    assert tables[0].schema.metadata[b"version"] != tables[1].schema.metadata[b"version"]
    assert after.predict([{"history": "fresh"}])[0]["items"] != before.predict([{"history": ""}])[0]["items"]
    again = dist_train(["add-items", "runs/first", "fresh.csv", "--output", "with-fresh"], shop)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    settings = shop / "with-fresh" / "recipe.yaml"
    settings.write_text(settings.read_text().replace("items: hybrid", "items: id"))
    by_ids = dist_train(["add-items", "with-fresh", "fresh.csv", "--output", "by-ids"], shop)
    assert by_ids.returncode == 2
    assert "by their ids alone" in by_ids.stderr
    assert not (shop / "by-ids").exists()


def _network_of(folder: Path) -> Path:
    """The model folder without its rules."""
    alone = folder.with_name(f"{folder.name}-network")
    if not alone.exists():
        shutil.copytree(folder, alone)
        settings = alone / "recipe.yaml"
        text, changed = re.subn(r"rules_share: \S+", "rules_share: 0.0", settings.read_text())
        assert changed == 1
        settings.write_text(text)
    return alone


def test_a_backtest_trains_up_to_several_moments_and_types_again_what_is_kept(shop: Path) -> None:
    words = ["backtest", "recsys", "name=ageing", *SETTINGS, *TRAINING, "train.epochs=2", "--cuts", "2"]
    done = dist_train(words, shop)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training anew every" in done.stdout
    result = json.loads((shop / "runs" / "ageing" / "backtest.json").read_text())
    assert [entry["age"] for entry in result["ages"]] == [0, 1]
    assert (shop / "runs" / "ageing" / "backtest.svg").read_text().startswith("<?xml")
    again = dist_train(words, shop)
    assert again.stdout.count("kept           ") == 2
    assert json.loads((shop / "runs" / "ageing" / "backtest.json").read_text()) == result


def test_a_run_whose_rank_is_killed_goes_on_bit_identical(shop: Path) -> None:
    # Everything that is drawn at random: dropout, left out ids, negatives.
    drawn = ["model.dropout=0.2", "model.id_dropout=0.3", "task.loss=sampled", "task.negatives=16"]
    often = ["checkpoint.every_steps=10", "track.log_every_steps=1", "train.epochs=null", "train.steps=120"]
    words = [*SETTINGS, *drawn, *often, "eval.every_steps=60", "parallel.processes_per_node=2"]
    done = dist_train(["run", "recsys", "name=whole", *words], shop)
    assert done.returncode == 0, done.stdout + done.stderr
    process = start(["run", "recsys", "name=killed", *words], shop)
    wait_for_step(shop / "runs" / "killed", 25)
    os.kill(rank_pids(shop / "runs" / "killed")[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    if process.returncode != 0:
        done = dist_train(["resume", "runs/killed"], shop)
        assert done.returncode == 0, output + done.stdout + done.stderr
    assert losses(shop / "runs" / "killed") == losses(shop / "runs" / "whole")
    assert final_shards(shop / "runs" / "killed") == final_shards(shop / "runs" / "whole")


@pytest.mark.parametrize(
    ("file", "row", "setting", "words"),
    [
        ("no_time", "user0,item1,soon", "", ["no_time.csv: row 4: timestamp is 'soon', which is no time"]),
        ("negative", "user0,item1,-5", "", ["row 4: timestamp is -5, which is negative"]),
        ("units", "user0,item1,1700000000000", "", ["row 4", "looks like milliseconds, but the times before it"]),
        ("unknown", "user0,elsewhere,900", "", ["'elsewhere' is not in the item table", "data.unknown_items"]),
        ("late", "user0,item1,900", "data.test_from=2030-01-01", ["the test split is empty", "2030-01-01"]),
    ],
)
def test_a_log_that_cannot_be_used_is_refused(shop: Path, file: str, row: str, setting: str, words: list[str]) -> None:
    rows = (shop / "events.csv").read_text().splitlines()
    (shop / f"{file}.csv").write_text("\n".join([*rows[:4], row, *rows[4:]]) + "\n")
    own = [word for word in SETTINGS if not word.startswith(("data.path=", "data.cache_dir="))]
    assert_refused(shop, ["recsys", *own, f"data.path={file}.csv", *([setting] if setting else [])], 3, words)


def test_users_of_one_event_and_items_without_content_are_counted_and_no_error(shop: Path) -> None:
    (shop / "more.csv").write_text((shop / "events.csv").read_text() + "once,item1,900\n")
    table = (shop / "items.csv").read_text().splitlines()
    (shop / "bare.csv").write_text("\n".join([*table[:-1], "item59,,,"]) + "\n")
    words = [*SETTINGS, "data.path=more.csv", "data.items_path=bare.csv"]
    done = dist_train(["prepare", "recsys", *words], shop)
    assert done.returncode == 0, done.stderr
    assert "1 items have no content" in done.stdout
