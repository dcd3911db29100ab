"""Data that grows costs only what is new; what was prepared before stays as it is."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_train.config_io import load
from dist_train.errors import DataError
from dist_train.prepared import is_whole, load_facts, prepare
from dist_train.recipe import load_recipe
from recipes.ticket_routing import chunks, data, groups, score, sources, split, tickets
from recipes.ticket_routing.config import Config, SyntheticConfig
from recipes.ticket_routing.stored import StoredSplit
from recipes.ticket_routing.synthetic import generate

SPLITS = ("train", "validation", "test")
# What the code before chunks and blocks gave for these 2,000 rows: up to one block nothing may change.
GOLDEN = json.loads((Path(__file__).parent / "data" / "ticket_routing_prepared.json").read_text())


def _prepare(cache: Path, *settings: str) -> tuple[Path, list[str]]:
    """The prepared folder, and what was said."""
    said: list[str] = []
    config: Any = load(
        "ticket_routing", [f"data.cache_dir={cache}", "data.vocab_size=800", *settings], site=False
    ).config
    return prepare(config, load_recipe("ticket_routing"), said.append), said


def _chunks(said: list[str]) -> list[str]:
    """What was kept and what was new, of the rows and of their tokens."""
    return [line.partition(": ")[2] for line in said if "chunks kept" in line]


def _write(path: Path, start: int, stop: int, seed: int = 7) -> Path:
    """Appends generated tickets to a CSV."""
    new = not path.exists()
    rows = generate(SyntheticConfig(seed=seed, near_duplicate_share=0.2), start, stop)
    with open(path, "a", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([("text", "label")] if new else [])
        writer.writerows(rows)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 50 rows and blocks of 100, so that a few hundred rows grow as millions do."""
    monkeypatch.setattr(sources, "CHUNK_ROWS", 50)
    for module in (data, groups, split, tickets):
        monkeypatch.setattr(module, "BLOCK_ROWS", 100)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _write_golden(folder: Path) -> None:
    rows = list(generate(SyntheticConfig(seed=7, near_duplicate_share=0.2), 0, 2000))
    with open(folder / "t.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "created", "part"])
        for index, (text, label) in enumerate(rows):
            part = ["train", "train", "test", "train"][index % 4]
            writer.writerow(["" if index % 401 == 400 else text, label, index * 37 % 500, part])
    with open(folder / "v.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows[:50]])


@pytest.mark.parametrize("case", GOLDEN)
def test_up_to_one_block_all_is_as_it_was_before_there_were_blocks(tmp_path: Path, case: str) -> None:
    _write_golden(tmp_path)
    settings = [setting.replace("FOLDER", str(tmp_path)) for setting in GOLDEN[case]["settings"]]
    folder, _ = _prepare(tmp_path / "cache", *settings)
    facts = load_facts(folder)
    seen = {"tokenizer": hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()[:16]}
    for name in SPLITS:
        stored = StoredSplit(folder, name)
        rows, ids, labels = (stored.table()[column].to_pylist() for column in ("row", "id", "label"))
        tokens = [stored.tokens(index).tolist() for index in range(len(stored))]
        seen[name] = _digest([rows, ids, stored.texts(), labels, tokens])
    names = ("rows", "labels", "splits", "split", "leaks", "lengths", "vocabulary", "warnings")
    seen["facts"] = _digest([facts[name] for name in names])
    assert seen == GOLDEN[case]["digests"]


@pytest.mark.usefixtures("small")
def test_more_generated_rows_cost_only_the_new_ones(tmp_path: Path) -> None:
    before, said = _prepare(tmp_path, "data.path=synthetic", "data.rows=300")
    assert _chunks(said) == ["0 of 6 chunks kept, 6 new"] * 2
    after, said = _prepare(tmp_path, "data.path=synthetic", "data.rows=400")
    assert _chunks(said) == ["6 of 8 chunks kept, 2 new"] * 2
    tokenizer = Path("tokenizer") / "tokenizer.json"
    assert (before / tokenizer).read_bytes() == (after / tokenizer).read_bytes()
    then, now = (_sides(folder, 300) for folder in (before, after))
    moved = then != now
    # A later row may unite two groups, which then all go to the first of their splits; it never does otherwise.
    assert (now[moved] < then[moved]).all()
    assert moved.mean() < 0.05


def _sides(folder: Path, rows: int) -> np.ndarray:
    sides = np.full(rows, -1)
    for index, name in enumerate(SPLITS):
        of_split = StoredSplit(folder, name).rows
        sides[of_split[of_split < rows]] = index
    return sides


@pytest.mark.usefixtures("small")
def test_a_file_that_grows_and_a_new_file_cost_only_what_is_new(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    _write(tmp_path / "in" / "b.csv", 0, 210)
    pattern = f"data.path={tmp_path}/in/*.csv"
    _prepare(tmp_path, pattern)
    _write(tmp_path / "in" / "b.csv", 210, 310)
    _, said = _prepare(tmp_path, pattern)
    assert _chunks(said) == ["4 of 7 chunks kept, 3 new"] * 2
    _write(tmp_path / "in" / "c.csv", 310, 350)
    _, said = _prepare(tmp_path, pattern)
    assert _chunks(said) == ["7 of 8 chunks kept, 1 new"] * 2
    # Sorted before all others it moves their rows, but they are not read into chunks again.
    _write(tmp_path / "in" / "a.csv", 350, 400)
    folder, said = _prepare(tmp_path, pattern)
    assert _chunks(said)[0] == "8 of 9 chunks kept, 1 new"
    rows = np.concatenate([StoredSplit(folder, name).rows for name in SPLITS])
    assert sorted(rows) == list(range(400))
    texts = dict(zip(StoredSplit(folder, "train").rows.tolist(), StoredSplit(folder, "train").texts(), strict=True))
    expected = [text for text, _ in generate(SyntheticConfig(seed=7, near_duplicate_share=0.2), 0, 400)]
    expected = expected[350:] + expected[:350]
    assert all(text == expected[row] for row, text in texts.items())


@pytest.mark.usefixtures("small")
def test_no_row_outside_training_teaches_the_tokenizer(tmp_path: Path) -> None:
    rows = list(generate(SyntheticConfig(), 0, 300))
    with open(tmp_path / "t.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "part"])
        for index, (text, label) in enumerate(rows):
            test = index % 4 == 0
            writer.writerow([f"{text} qqqq" if test else text, label, "test" if test else "train"])
    folder, _ = _prepare(tmp_path, f"data.path={tmp_path}/t.csv", "data.split_column=part")
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert not any("qq" in token for token in vocabulary)
    assert any("ee" in token for token in vocabulary)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("order", [1, -1])
def test_time_tells_the_split_of_many_blocks_whatever_the_order_of_the_rows(tmp_path: Path, order: int) -> None:
    rows = list(generate(SyntheticConfig(near_duplicate_share=0.0), 0, 400))[::order]
    times = list(range(400))[::order]
    pq.write_table(
        pa.table({"text": [row[0] for row in rows], "label": [row[1] for row in rows], "at": times}),
        tmp_path / "t.parquet",
    )
    folder, _ = _prepare(tmp_path, f"data.path={tmp_path}/t.parquet", "data.time_column=at")
    at = {name: [times[row] for row in StoredSplit(folder, name).rows] for name in SPLITS}
    assert max(at["train"]) < min(at["validation"]) <= max(at["validation"]) < min(at["test"])
    # Newest first, the first block has no row that trains in all of the data: others teach the tokenizer.
    assert load_facts(folder)["vocabulary"] > 300


@pytest.mark.usefixtures("small")
def test_a_partitioned_folder_is_prepared_with_a_label_from_its_folders(tmp_path: Path) -> None:
    for text, label in generate(SyntheticConfig(), 0, 240):
        part = tmp_path / "data" / f"queue={label}"
        part.mkdir(parents=True, exist_ok=True)
        with open(part / "texts", "a") as stream:
            stream.write(text + "\n")
    for file in (tmp_path / "data").glob("*/texts"):
        pq.write_table(pa.table({"text": file.read_text().splitlines()}), file.with_name("part-0.parquet"))
    settings = (f"data.path={tmp_path}/data", "data.label_column=queue")
    folder, _ = _prepare(tmp_path, *settings)
    facts = load_facts(folder)
    assert facts["rows"] == 240
    assert facts["labels"] == sorted(path.name[6:] for path in (tmp_path / "data").iterdir())
    # The same file under another label is other data.
    (tmp_path / "data" / "queue=Access").rename(tmp_path / "data" / "queue=Accounts")
    assert "Accounts" in load_facts(_prepare(tmp_path, *settings)[0])["labels"]


@pytest.mark.usefixtures("small")
def test_an_error_names_the_row_of_the_source_and_keeps_the_chunks_before_it(tmp_path: Path) -> None:
    _write(tmp_path / "t.csv", 0, 120)
    with open(tmp_path / "t.csv", "a") as stream:
        stream.write("a text without a label,\n")
    with pytest.raises(DataError, match="row 120 has no label in 'label'"):
        _prepare(tmp_path / "cache", f"data.path={tmp_path}/t.csv")
    assert len(list((tmp_path / "cache" / "chunks").glob("rows-*"))) == 2
    text = (tmp_path / "t.csv").read_text().replace("a label,\n", "a label,Access\n")
    (tmp_path / "t.csv").write_text(text)
    _, said = _prepare(tmp_path / "cache", f"data.path={tmp_path}/t.csv")
    assert _chunks(said) == ["2 of 3 chunks kept, 1 new", "0 of 3 chunks kept, 3 new"]


@pytest.mark.usefixtures("small")
def test_the_prepared_folder_outlives_its_chunks_and_a_damaged_chunk_is_made_again(tmp_path: Path) -> None:
    folder, _ = _prepare(tmp_path, "data.path=synthetic", "data.rows=200")
    texts = StoredSplit(folder, "train").texts()
    chunk = next((tmp_path / "chunks").glob("rows-*"))
    (chunk / "sets.npy").write_bytes(b"")
    _, said = _prepare(tmp_path, "data.path=synthetic", "data.rows=250")
    assert _chunks(said) == ["3 of 5 chunks kept, 2 new", "4 of 5 chunks kept, 1 new"]
    shutil.rmtree(tmp_path / "chunks")
    assert is_whole(folder)
    assert StoredSplit(folder, "train").texts() == texts
    assert len(StoredSplit(folder, "train").tokens(0)) > 0


@pytest.mark.usefixtures("small")
def test_two_preparations_at_once_share_the_chunks(tmp_path: Path) -> None:
    folders: list[Path] = []

    def work(seed: int) -> None:
        settings = ("data.path=synthetic", "data.rows=300", f"data.split_seed={seed}")
        folders.append(_prepare(tmp_path, *settings)[0])

    threads = [threading.Thread(target=work, args=(seed % 2,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(set(folders)) == 2
    assert all(is_whole(folder) for folder in folders)
    assert len(list((tmp_path / "chunks").glob("rows-*"))) == 6
    assert not list((tmp_path / "chunks").glob(".tmp-*"))


def test_a_killed_preparation_goes_on_with_the_chunks_that_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_ROWS", 50)
    code = (
        "import sys; from recipes.ticket_routing import sources, chunks; sources.CHUNK_ROWS = 50\n"
        "from dist_train.config_io import load; from dist_train.prepared import prepare\n"
        "from dist_train.recipe import load_recipe\n"
        "config = load('ticket_routing', sys.argv[1:], site=False).config\n"
        "prepare(config, load_recipe('ticket_routing'))"
    )
    settings = ["data.path=synthetic", "data.rows=1500", f"data.cache_dir={tmp_path}", "data.vocab_size=800"]
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", code, *settings], cwd=root, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "chunks").glob("rows-*"))) < 5:
            assert time.monotonic() < deadline
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    whole = len([path for path in (tmp_path / "chunks").glob("rows-*") if is_whole(path)])
    assert whole == len(list((tmp_path / "chunks").glob("rows-*")))
    folder, said = _prepare(tmp_path, *settings)
    assert _chunks(said)[0] == f"{whole} of 30 chunks kept, {30 - whole} new"
    assert is_whole(folder)
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_killed_workers_left_is_removed_after_a_day(tmp_path: Path) -> None:
    for name, age_s in ((".tmp-old", 2 * 24 * 3600), (".tmp-new", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    chunks.remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-new"]


def test_the_ngram_baseline_learns_from_a_bounded_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = _prepare(tmp_path, "data.path=synthetic", "data.rows=400")
    monkeypatch.setattr(score, "_MOST_BASELINE_ROWS", 100)
    chosen = score._baseline_rows(280)
    assert len(chosen) == len(set(chosen.tolist())) == 100
    assert chosen.tolist() == sorted(chosen)
    tables = score.baselines(folder, Config(recipe="ticket_routing"), lambda text: None)
    assert tables["ngram"]["test"].num_rows == len(StoredSplit(folder, "test"))
    for kept in folder.glob("baselines-*"):
        shutil.rmtree(kept)
    monkeypatch.setattr(score, "_PREDICTED_AT_ONCE", 7)
    assert score.baselines(folder, Config(recipe="ticket_routing"), lambda text: None) == tables, "predicted in parts"
    assert "at most 200,000 training rows" in score.BASELINES["ngram"]


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet", "synthetic"])
def test_the_space_that_is_said_beforehand_is_about_what_it_takes(tmp_path: Path, kind: str) -> None:
    rows = list(generate(SyntheticConfig(), 0, 3000))
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [row[0] for row in rows], "label": [row[1] for row in rows]}), path)
    else:
        text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind == "csv.gz" else text.encode())
    config: Any = load(
        "ticket_routing", [f"data.path={'synthetic' if kind == 'synthetic' else path}", "data.rows=3000"], site=False
    ).config
    (source,) = sources.find_sources(config.data)
    _prepare(tmp_path / "cache", f"data.path={config.data.path}", "data.rows=3000")
    inodes = {file.stat().st_ino: file.stat().st_size for file in (tmp_path / "cache").rglob("*.*") if file.is_file()}
    arrays = sum(inodes.values())
    assert 0.6 * arrays < source.bytes_needed < 2.5 * arrays
