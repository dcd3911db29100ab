"""From tickets to splits without leaks, kept by content; the generator of tickets."""

from __future__ import annotations

import collections
import csv
import hashlib
import itertools
import json
import random
import shutil
import subprocess
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config_io import load
from dist_train.errors import DataError
from dist_train.prepared import load_facts, prepare
from dist_train.recipe import load_recipe
from recipes.ticket_routing import score, split
from recipes.ticket_routing.config import Config, DataConfig, SyntheticConfig
from recipes.ticket_routing.data import misfit
from recipes.ticket_routing.duplicates import sign, words_of
from recipes.ticket_routing.groups import Grouped, group
from recipes.ticket_routing.stored import StoredSplit
from recipes.ticket_routing.synthetic import generate
from tests.front_door import COMMON, mounted, write_tickets

SPLITS = ("train", "validation", "test")
LONG = " ".join(f"word{index}" for index in range(40))


def _prepare(path: Path | str, cache: Path, *settings: str) -> Path:
    overrides = [f"data.path={path}", "data.label_column=queue", f"data.cache_dir={cache}", *settings]
    config: Any = load("ticket_routing", overrides, site=False).config
    return prepare(config, load_recipe("ticket_routing"), lambda text: None)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _tickets(count: int, **columns: Any) -> list[dict[str, Any]]:
    generator = random.Random(0)
    return [
        {"text": " ".join(generator.choices(COMMON, k=8)) + f" {index} {index * 7}", "queue": "ab"[index % 2]}
        | {name: value(index) for name, value in columns.items()}
        for index in range(count)
    ]


def _rows(folder: Path, name: str) -> list[int]:
    return StoredSplit(folder, name).rows.tolist()


def _tokens(stored: StoredSplit) -> list[list[int]]:
    return [stored.tokens(index).tolist() for index in range(len(stored))]


def _group(texts: list[str]) -> np.ndarray:
    """For each text the index of its group's first text."""
    signed = sign(texts)
    words = [words_of(text) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        return group(
            signed.sets, signed.sketches, signed.sizes, lambda band: signed.bands[band], words.__getitem__, Path(folder)
        ).groups


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tickets(tmp_path_factory.mktemp("tickets") / "tickets.csv", 600)


def test_a_prepared_folder_is_found_again_by_content_and_rebuilt_when_it_is_not_whole(
    tickets: Path, tmp_path: Path
) -> None:
    folder = _prepare(tickets, tmp_path)
    made = (folder / "facts.json").stat().st_mtime_ns
    renamed = tmp_path / "renamed.csv"
    renamed.write_bytes(tickets.read_bytes())
    assert _prepare(renamed, tmp_path) == folder
    assert (folder / "facts.json").stat().st_mtime_ns == made
    (folder / "test.npy").unlink()
    assert _prepare(tickets, tmp_path) == folder
    assert (folder / "test.npy").is_file()
    renamed.write_text(tickets.read_text() + "one more ticket about the network,network\n")
    assert _prepare(renamed, tmp_path) != folder


def test_every_row_is_in_one_split_and_every_queue_has_its_share(tickets: Path, tmp_path: Path) -> None:
    folder = _prepare(tickets, tmp_path)
    facts = load_facts(folder)
    rows = sorted(itertools.chain.from_iterable(_rows(folder, name) for name in SPLITS))
    assert rows == list(range(600))
    for label in facts["labels"]:
        total = sum(facts["splits"][name]["labels"][label] for name in SPLITS)
        assert facts["splits"]["test"]["labels"][label] == pytest.approx(0.2 * total, abs=2)
        assert facts["splits"]["validation"]["labels"][label] == pytest.approx(0.1 * total, abs=2)


def test_the_split_follows_its_own_seed_and_not_that_of_the_training(tickets: Path, tmp_path: Path) -> None:
    first, same, other = (_prepare(tickets, tmp_path, word) for word in ("seed=0", "seed=5", "data.split_seed=1"))
    assert first == same
    assert _rows(first, "test") != _rows(other, "test")


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=30, max_size=120), seed=st.integers(0, 99))
def test_near_duplicates_never_lie_on_both_sides(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    generator.shuffle(groups)
    labels = (groups % 3).astype(np.int32)
    result = split.stratified(labels, Grouped(groups, groups), DataConfig(split_seed=seed))
    assert all(len(set(result[groups == group])) == 1 for group in np.unique(groups))
    assert (result == split.TEST).mean() == pytest.approx(0.2, abs=0.15)


def test_similar_tickets_are_one_group_and_groups_are_transitive() -> None:
    words = [f"w{index}" for index in range(60)]
    chain = [" ".join(words[start : start + 40]) for start in range(0, 9, 2)]  # neighbours share 38 of 42 words
    texts = [*chain, "something else entirely", LONG, LONG.upper() + " !!", "", ""]
    groups = _group(texts)
    assert set(groups[:5]) == {0}, "the first and the last share 32 of 48 words, but a chain leads there"
    assert groups[6] == groups[7], "case and punctuation do not tell tickets apart"
    assert len({groups[5], groups[6], groups[8], groups[9], groups[0]}) == 5, "texts without words are alone"


@pytest.mark.parametrize(("shared", "together"), [(19, True), (18, False)])
def test_the_threshold_is_a_jaccard_of_nine_tenths(shared: int, together: bool) -> None:
    first = [f"w{index}" for index in range(20)]
    second = [*first[:shared], *(f"v{index}" for index in range(shared, 19))]
    groups = _group([" ".join(first), " ".join(second)])
    assert (int(groups[0]) == int(groups[1])) is together


def test_thousands_of_tickets_from_one_template_are_one_group_at_once() -> None:
    texts = [f"{LONG} host{index}" for index in range(20_000)]
    began = time.process_time()
    groups = _group(texts)
    assert len(set(groups)) == 1
    assert time.process_time() - began < 4, "their 140 million pairs take several times as long"


def test_classes_that_differ_in_case_alone_are_warned_of(tmp_path: Path) -> None:
    rows = [
        {**row, "queue": row["queue"].upper() if index % 9 == 0 else row["queue"]}
        for index, row in enumerate(_tickets(90))
    ]
    warnings = load_facts(_prepare(_write(tmp_path / "t.csv", rows), tmp_path))["warnings"]
    assert warnings == ["classes that differ in case alone count as different: 'A', 'B', 'a', 'b'"]


def test_a_test_split_is_made_where_only_a_validation_file_is_given(tickets: Path, tmp_path: Path) -> None:
    held_out = _write(tmp_path / "v.csv", _tickets(40, queue=lambda index: ["network", "hardware"][index % 2]))
    folder = _prepare(tickets, tmp_path, f"data.validation_path={held_out}", "data.test_share=0.25")
    assert len(_rows(folder, "validation")) == 40
    assert len(_rows(folder, "test")) == pytest.approx(0.25 / 0.9 * 600, abs=4)
    assert set(load_facts(folder)["leaks"]["groups_crossing"].values()) == {0}


def test_weights_do_not_fit_data_of_other_queues_or_another_vocabulary() -> None:
    facts = {"labels": ["a", "b"], "vocabulary": 900}
    assert misfit(facts, facts) is None
    assert "queues" in str(misfit(facts, {**facts, "labels": ["a", "c"]}))
    assert "901 entries instead of 900" in str(misfit(facts, {**facts, "vocabulary": 901}))


def test_a_killed_or_failed_preparation_leaves_nothing(tickets: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer"):
        _prepare(
            tickets, tmp_path / "cache", f"data.tokenizer={_write(tmp_path / 'tokenizer.json', _tickets(2)).parent}"
        )
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_the_baseline_needs_no_cache_that_can_be_written_and_no_word_that_stands_twice(tmp_path: Path) -> None:
    words = (f"x{index}" for index in range(10_000))
    rows = [{"text": " ".join(itertools.islice(words, 4)), "queue": "ab"[index % 2]} for index in range(60)]
    folder = _prepare(_write(tmp_path / "t.csv", rows), tmp_path / "cache")
    with mounted(tmp_path / "readonly", "size=9m") as place:
        shutil.copytree(folder, place / "data")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        tables = score.baselines(place / "data", Config(recipe="ticket_routing"), lambda text: None)
        assert tables["ngram"]["test"].num_rows == tables["majority"]["test"].num_rows > 0


def test_one_very_long_ticket_costs_no_memory_for_each_of_the_others(tmp_path: Path) -> None:
    rows = [*_tickets(300), {"text": "endless " * 100_000, "queue": "a"}]
    path = _write(tmp_path / "t.csv", rows)
    tracemalloc.start()
    _prepare(path, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6, "an array of 301 texts as wide as the longest holds 960 MB"


def test_the_leak_report_counts_what_is_there(tmp_path: Path) -> None:
    rows = _tickets(60)
    rows += [{"text": LONG, "queue": "a"}, {"text": LONG + "!", "queue": "b"}, {"text": LONG + " x", "queue": "a"}]
    leaks = load_facts(_prepare(_write(tmp_path / "t.csv", rows), tmp_path))["leaks"]
    assert leaks["near_duplicate_groups"] == 1
    assert leaks["near_duplicate_rows"] == leaks["largest_group"] == 3
    assert leaks["exact_duplicates"] == 1
    assert leaks["groups_with_conflicting_labels"] == 1
    assert set(leaks["groups_crossing"].values()) == {0}


def test_a_split_by_time_trains_on_the_past(tmp_path: Path) -> None:
    rows = _tickets(100, created=lambda index: f"2026-01-{1 + (index * 37 % 100) // 10:02d}T08:00:00")
    folder = _prepare(_write(tmp_path / "t.csv", rows), tmp_path, "data.time_column=created")
    times = {name: [rows[row]["created"] for row in _rows(folder, name)] for name in SPLITS}
    # Strictly: tickets of one time never lie on both sides of a cut.
    assert max(times["train"]) < min(times["validation"])
    assert max(times["validation"]) < min(times["test"])
    rows[3]["created"] = "yesterday"
    with pytest.raises(DataError, match="row 3 has the time 'yesterday'"):
        _prepare(_write(tmp_path / "t.csv", rows), tmp_path, "data.time_column=created")


def test_an_own_split_is_respected_and_its_leaks_are_counted(tmp_path: Path) -> None:
    rows = _tickets(100, part=lambda index: ["train", "valid", "Test", "train"][index % 4])
    rows[2]["text"] = rows[0]["text"]
    folder = _prepare(_write(tmp_path / "t.csv", rows), tmp_path, "data.split_column=part")
    assert _rows(folder, "validation") == list(range(1, 100, 4))
    assert _rows(folder, "test") == list(range(2, 100, 4))
    facts = load_facts(folder)
    assert facts["leaks"]["groups_crossing"]["train-test"] == 1
    assert any("both sides" in warning for warning in facts["warnings"])
    rows[5]["part"] = "sometimes"
    with pytest.raises(DataError, match="row 5 has the split 'sometimes'; allowed are train, validation and test"):
        _prepare(_write(tmp_path / "t.csv", rows), tmp_path, "data.split_column=part")


def test_files_of_their_own_for_each_split_are_respected(tmp_path: Path) -> None:
    rows = _tickets(100)
    for name, start, stop in (("train", 0, 70), ("test", 70, 100)):
        _write(tmp_path / f"{name}.csv", rows[start:stop])
    folder = _prepare(tmp_path / "train.csv", tmp_path, f"data.test_path={tmp_path}/test.csv")
    assert _rows(folder, "test") == list(range(70, 100))
    assert len(_rows(folder, "validation")) == pytest.approx(70 * 0.125, abs=3), "carved out of the training rows"


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (lambda rows: [*rows, {**rows[0], "queue": "solo"}], [], ["one row only", "'solo'", "drop_labels_below=2"]),
        (lambda rows: [row for row in rows if row["queue"] == "a"], [], ["all rows have the class 'a'"]),
        (lambda rows: [*rows, {**rows[0], "queue": " "}], [], ["row 60 has no label"]),
        (lambda rows: [*rows, *({**row, "queue": "new", "part": "test"} for row in rows[:3])],
         ["data.split_column=part"], ["the test split has classes that training lacks: 'new'"]),
        (lambda rows: [{**row, "part": "train"} for row in rows], ["data.split_column=part"], ["no test rows"]),
        (lambda rows: [{**row, "text": " "} for row in rows], [], ["all 60 rows are without text"]),
    ],
)  # fmt: skip
def test_data_that_cannot_be_split_is_refused(
    tmp_path: Path, change: Any, settings: list[str], words: list[str]
) -> None:
    rows = change(_tickets(60, part=lambda index: "test" if index % 5 == 0 else "train"))
    with pytest.raises(DataError) as refusal:
        _prepare(_write(tmp_path / "t.csv", rows), tmp_path, *settings)
    for word in words:
        assert word in str(refusal.value)
    assert not list(tmp_path.glob("ticket_routing-*")), "nothing half-built may stay"


def test_rare_queues_and_empty_texts_are_left_out_with_a_warning(tmp_path: Path) -> None:
    rows = [*_tickets(60), {"text": "alone", "queue": "rare"}, {"text": "", "queue": "a"}]
    facts = load_facts(_prepare(_write(tmp_path / "t.csv", rows), tmp_path, "data.drop_labels_below=2"))
    assert (facts["rows"], facts["labels"]) == (60, ["a", "b"])
    assert any("rare" in warning for warning in facts["warnings"])
    assert any("1 rows without text" in warning for warning in facts["warnings"])


def test_several_text_columns_become_one_text_and_long_ones_are_cut(tmp_path: Path) -> None:
    rows = [{"subject": f"Ticket {row['text']}", **row} for row in _tickets(60)]
    columns = ["data.text_columns=[subject,text]", "data.max_tokens=9"]
    folder = _prepare(_write(tmp_path / "t.csv", rows), tmp_path, *columns)
    stored = StoredSplit(folder, "train")
    assert (
        stored.texts(np.array([0]))[0]
        == f"{rows[_rows(folder, 'train')[0]]['subject']}\n{rows[_rows(folder, 'train')[0]]['text']}"
    )
    assert max(map(len, _tokens(stored))) == stored.lengths.max() == 9
    assert load_facts(folder)["lengths"]["at_limit_share"] > 0


def test_the_token_ids_are_those_of_the_saved_tokenizer(tickets: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = _prepare(tickets, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    stored = StoredSplit(folder, "test")
    assert tokenizer(stored.texts(), truncation=True)["input_ids"] == _tokens(stored)
    assert tokenizer.vocab_size == load_facts(folder)["vocabulary"]


def _generated(rows: int, **settings: Any) -> list[dict[str, str]]:
    return [{"text": text, "label": queue} for text, queue in generate(SyntheticConfig(**settings), 0, rows)]


def test_generated_tickets_are_a_function_of_seed_and_number() -> None:
    assert _generated(500) == _generated(2000)[:500]
    assert _generated(50, seed=1) != _generated(50)
    digest = hashlib.sha256(json.dumps(_generated(500)).encode()).hexdigest()
    assert digest[:16] == "b5edaabceb9baa98", "other tickets need another synthetic.VERSION"


def test_generated_tickets_look_like_real_ones() -> None:
    rows = _generated(4000)
    counts = collections.Counter(row["label"] for row in rows).most_common()
    assert len(counts) == 8
    assert counts[0][1] > 3 * counts[-1][1], "a long tail of queues"
    lengths = sorted(len(row["text"].split()) for row in rows)
    assert lengths[-40] > 4 * lengths[2000], "a long tail of lengths"
    groups = _group([row["text"] for row in rows])
    assert 1 - len(set(groups)) / len(rows) == pytest.approx(0.03, abs=0.015), "the stated share of near-duplicates"


def test_the_stated_share_of_labels_is_wrong() -> None:
    settings: dict[str, Any] = {"near_duplicate_share": 0.0}
    clean, noisy = (
        _generated(3000, wrong_label_share=0.0, **settings),
        _generated(3000, wrong_label_share=0.2, **settings),
    )
    assert [row["text"] for row in clean] == [row["text"] for row in noisy]
    wrong = np.mean([first["label"] != second["label"] for first, second in zip(clean, noisy, strict=True)])
    assert wrong == pytest.approx(0.2, abs=0.025)
