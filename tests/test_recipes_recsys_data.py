"""The log is prepared without what came later, and what is wrong with it is named."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train import config_io
from dist_train.errors import ConfigError, DataError
from dist_train.prepared import load_facts, prepare
from dist_train.recipe import load_recipe
from recipes.recsys.sessions import USER
from recipes.recsys.stored import StoredSessions, read_content, read_items
from tests.sessions import SETTINGS, write_log, write_rows


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_log(folder)
    return folder


@pytest.fixture
def here(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the log, to work in."""
    for name in ("events.csv", "items.csv"):
        shutil.copy(log / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _prepare(*words: str) -> Path:
    config: Any = config_io.load("recsys", [*SETTINGS, *words], site=False).config
    return prepare(config, load_recipe(config.recipe), lambda text: None)


def _rows(path: str) -> list[list[str]]:
    with open(path, newline="") as stream:
        return list(csv.reader(stream))


def _rewrite(path: str, rows: list[list[str]]) -> None:
    write_rows(Path(path), tuple(rows[0]), [tuple(row) for row in rows[1:]])


def _cut(folder: Path) -> int:
    return int(load_facts(folder)["cuts"][0]) // 1000


def test_what_comes_after_the_cut_changes_nothing_that_the_model_learns_from(here: Path) -> None:
    before = _prepare()
    cut = _cut(before)
    bounds = [f"data.validation_from={cut}", f"data.test_from={load_facts(before)['cuts'][1] // 1000}"]
    before = _prepare(*bounds)
    events, table = _rows("events.csv"), _rows("items.csv")
    late = sorted({row[1] for row in events[1:] if int(row[2]) >= cut})
    # Later events are of other items, among them a new one, whose words stand nowhere else.
    changed = [row if int(row[2]) < cut else [row[0], late[index % 3], row[2]] for index, row in enumerate(events[1:])]
    changed.append(["user0", "brand new", str(max(int(row[2]) for row in events[1:]))])
    _rewrite("events.csv", [events[0], *changed])
    _rewrite("items.csv", [*table, ["brand new", "unheard unheard words words", "kind of its own", "900"]])
    after = _prepare(*bounds)
    assert before != after
    trained = load_facts(before)["trained_items"]
    assert load_facts(after)["trained_items"] == trained
    for name in ("content.json", "content_axes.npy"):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name
    assert _training(before) == _training(after)
    assert read_items(before)[:trained].equals(read_items(after)[:trained])
    for ours, theirs in zip(read_content(before), read_content(after), strict=True):
        assert np.array_equal(ours[: trained + 1], theirs[: trained + 1])


def _training(folder: Path) -> list[list[int]]:
    stored = StoredSessions(folder)
    return [stored.items[begin:stop].tolist() for begin, _, stop, _ in stored.rows("train").tolist()]


def test_trained_items_come_first_and_those_alone_have_training_events(here: Path) -> None:
    folder = _prepare()
    counts = read_items(folder)["count"].to_numpy()
    trained = load_facts(folder)["trained_items"]
    assert (counts[:trained] > 0).all()
    assert not counts[trained:].any()
    assert load_facts(folder)["splits"]["test"]["targets_not_trained"] > 0


def test_without_an_item_table_the_catalogue_is_what_was_trained_on(here: Path) -> None:
    bare = ["data.items_path=null", "data.text_columns=[]", "data.category_columns=[]", "data.number_columns=[]"]
    folder = _prepare(*bare, "model.items=id")
    facts = load_facts(folder)
    assert facts["items"] == facts["trained_items"]
    stored = StoredSessions(folder)
    unknown = [int((stored.items[first:stop] == 0).sum()) for _, first, stop, _ in stored.rows("test").tolist()]
    assert sum(unknown) == facts["splits"]["test"]["targets_not_trained"] > 0


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (2, "yesterday", r"events.csv: row 7: timestamp is 'yesterday', which is no time"),
        (2, "-5", r"events.csv: row 7: timestamp is -5, which is negative"),
        (
            2,
            "1700000000000",
            r"row 7: timestamp is 1700000000000, which looks like milliseconds, but the times before it",
        ),
        (2, "", r"row 7: timestamp is empty"),
        (1, "item999", r"row 7: the item 'item999' is not in the item table"),
        (1, "", r"row 7: item_id is empty"),
        (0, "", r"row 7: user_id is empty"),
    ],
)
def test_an_event_that_cannot_be_used_is_named(here: Path, column: int, value: str, message: str) -> None:
    rows = _rows("events.csv")
    rows[7][column] = value
    _rewrite("events.csv", rows)
    with pytest.raises(DataError, match=message):
        _prepare()


def test_the_first_twenty_bad_events_are_named_and_all_are_counted(here: Path) -> None:
    rows = _rows("events.csv")
    for row in rows[1:31]:
        row[2] = "never"
    _rewrite("events.csv", rows)
    with pytest.raises(DataError, match=r"30 row\(s\) cannot be used[\s\S]*row 20: .*\n… and 10 more"):
        _prepare()


def test_events_of_unknown_items_can_be_dropped_and_are_counted(here: Path) -> None:
    rows = _rows("events.csv")
    rows[7][1] = "item999"
    _rewrite("events.csv", rows)
    assert load_facts(_prepare("data.unknown_items=drop"))["notes"]["events_of_unknown_items"] == 1


def test_an_item_that_stands_twice_in_the_table_is_named(here: Path) -> None:
    rows = _rows("items.csv")
    _rewrite("items.csv", [*rows, rows[3]])
    with pytest.raises(DataError, match=r"row 61: the item 'item2' stands in row 3 already"):
        _prepare()


def test_a_training_target_is_predicted_from_what_came_strictly_before_it(here: Path) -> None:
    rows = _rows("events.csv")
    day = max(int(row[2]) for row in rows[1:]) // 3
    # A new user: one event, then three at one moment, then one more; and one whose first three are of one moment.
    for user, moments in (("tied", [1, 2, 2, 2, 3]), ("tied first", [1, 1, 1, 2])):
        rows += [[user, f"item{place}", str(day + moment)] for place, moment in enumerate(moments)]
    _rewrite("events.csv", rows)
    folder = _prepare()
    config: Any = config_io.load("recsys", list(SETTINGS), site=False).config
    task = load_recipe("recsys").make_task(config, folder)
    stored = StoredSessions(folder)
    names = stored.user_names.to_pylist()
    chosen = [names.index(user) for user in ("tied", "tied first")]
    train = task.rows("train")
    users = stored.rows("train")[:, USER].tolist()
    tied, first = train.take(np.array([users.index(user) for user in chosen]))
    assert tied.before.tolist() == [1, 1, 1, 4]
    assert first.before.tolist() == [1, 2, 3], "without anything before it, from what stands beside it"
    batch = task.collate([tied, first], np.zeros(2, dtype=np.uint64))
    assert batch["place"].tolist() == [1, 1, 1, 4, 5 + 1, 5 + 2, 5 + 3]


def test_an_event_counts_half_as_much_for_each_half_life_that_it_is_older(here: Path) -> None:
    stored = StoredSessions(_prepare("data.half_life_days=10"))
    cut = stored.facts["cuts"][0]
    assert stored.weights is not None
    assert stored.times is not None
    days = (cut - np.asarray(stored.times)) / 86_400_000
    np.testing.assert_allclose(stored.weights, np.exp2(-np.maximum(days, 0) / 10), rtol=1e-6)
    assert (np.asarray(StoredSessions(_prepare("data.half_life_days=0.001")).weights) > 0).all()
    with pytest.raises(ConfigError, match="half_life_days is 3, but data"):
        _prepare("data.half_life_days=3", "data.split=leave_one_out")


def test_items_without_content_are_counted(here: Path) -> None:
    rows = _rows("items.csv")
    rows[5][1:] = ["", "", ""]
    _rewrite("items.csv", rows)
    assert any("1 items have no content" in warning for warning in load_facts(_prepare())["warnings"])


def test_a_category_that_names_the_item_is_refused(here: Path) -> None:
    with pytest.raises(DataError, match="column 'title' has 60 different values for 60 items: it names the item"):
        _prepare("data.category_columns=[title]", "data.text_columns=[]")


def test_text_that_copies_the_id_is_refused(here: Path) -> None:
    rows = _rows("items.csv")
    _rewrite("items.csv", [rows[0], *([row[0], row[0], *row[2:]] for row in rows[1:])])
    with pytest.raises(DataError, match="column 'title' repeats 'item_id' in 60 of 60 items"):
        _prepare()


def test_content_that_was_written_after_the_cut_is_refused(here: Path) -> None:
    cut = _cut(_prepare())
    rows = _rows("items.csv")
    stamped = [[*row, str(cut - 1)] for row in rows[1:]]
    _rewrite("items.csv", [[*rows[0], "written"], *stamped])
    _prepare("data.content_time_column=written")
    stamped[4][-1] = str(cut)
    _rewrite("items.csv", [[*rows[0], "written"], *stamped])
    with pytest.raises(DataError, match=r"content of 1 items was written at or after the end of the training.*'item4'"):
        _prepare("data.content_time_column=written")


def test_a_number_that_tells_later_sales_is_warned_of(here: Path) -> None:
    cut = _cut(_prepare())
    later: dict[str, int] = {}
    for row in _rows("events.csv")[1:]:
        later[row[1]] = later.get(row[1], 0) + (int(row[2]) >= cut)
    rows = _rows("items.csv")
    _rewrite("items.csv", [rows[0], *([*row[:3], str(later.get(row[0], 0))] for row in rows[1:])])
    assert any("price goes with what is clicked after" in warning for warning in load_facts(_prepare())["warnings"])


def test_sessions_that_stand_in_training_and_test_are_counted(here: Path) -> None:
    rows: list[tuple[object, ...]] = [
        (f"user{i % 9}", f"item{i % 50} item{(i * 7) % 50}", f"item{(i * 3) % 50}") for i in range(100)
    ]
    write_rows(here / "sessions.csv", ("user_id", "history", "target"), rows)
    words = ["data.path=sessions.csv", "data.kind=sessions"]
    assert load_facts(_prepare(*words))["leaks"]["sessions_crossing"] == 0
    rows[95] = rows[3]
    write_rows(here / "sessions.csv", ("user_id", "history", "target"), rows)
    facts = load_facts(_prepare(*words))
    assert facts["leaks"]["sessions_crossing"] == 1
    assert any("1 rows of validation and test are in the training too" in warning for warning in facts["warnings"])


def test_a_user_with_one_event_has_nothing_to_predict_and_is_counted(here: Path) -> None:
    before = load_facts(_prepare())["notes"].get("events_with_too_little_history", 0)
    rows = _rows("events.csv")
    last = max(int(row[2]) for row in rows[1:])
    _rewrite("events.csv", [*rows, ["once", "item1", str(last)]])
    assert load_facts(_prepare())["notes"]["events_with_too_little_history"] == before + 1


def test_leave_one_out_is_said_to_be_a_legacy_protocol(here: Path) -> None:
    facts = load_facts(_prepare("data.split=leave_one_out"))
    assert "legacy" in facts["split"]["method"]
    assert any("leave-one-out is a legacy protocol" in warning for warning in facts["warnings"])


def test_content_without_a_column_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.items is hybrid, but no column of the item table is named"):
        config_io.load("recsys", ["data.path=events.csv"], site=False)


@pytest.mark.parametrize("key", ["types", "weight_column", "validation_from", "test_until", "available_from_column"])
def test_a_key_that_sessions_have_no_use_for_is_refused(key: str) -> None:
    value = "[a]" if key == "types" else "a"
    more = ["data.type_column=b"] if key == "types" else []
    with pytest.raises(ConfigError, match=f"data.{key} is .*set it to null"):
        config_io.load("recsys", [*SETTINGS, "data.kind=sessions", f"data.{key}={value}", *more], site=False)


def test_a_log_none_of_whose_items_is_in_the_table_is_said_so(here: Path) -> None:
    rows = _rows("events.csv")
    _rewrite("events.csv", [rows[0], *([user, f"0{item}", time] for user, item, time in rows[1:])])
    with pytest.raises(DataError, match=r"no event is left.*leading zeros"):
        _prepare("data.unknown_items=drop")


def test_dates_without_hyphens_are_no_seconds(here: Path) -> None:
    rows = _rows("events.csv")
    _rewrite("events.csv", [rows[0], *([user, item, "20240131"] for user, item, _ in rows[1:])])
    with pytest.raises(DataError, match="20240131, a date without hyphens"):
        _prepare()


def test_a_sequence_without_items_is_left_out_and_counted(here: Path) -> None:
    lines = [f"u{user},item{user} item{user + 1} item{user + 2} item{user + 3}" for user in range(30)]
    (here / "sequences.csv").write_text("\n".join(["user_id,items", lines[0], "empty,", *lines[1:], "last,"]) + "\n")
    folder = _prepare("data.path=sequences.csv", "data.kind=sequences", "data.split=leave_one_out")
    facts = load_facts(folder)
    assert facts["notes"]["rows_without_items"] == 2
    assert facts["splits"]["test"]["rows"] == 30


def test_a_long_first_row_of_sessions_has_no_more_targets_than_are_read(here: Path) -> None:
    history = " ".join(f"item{number % 50}" for number in range(40))
    rows = [(f"u{user}", history, "item7") for user in range(20)]
    write_rows(here / "sessions.csv", ("user_id", "history", "target"), rows)  # type: ignore[arg-type]
    words = ["data.path=sessions.csv", "data.kind=sessions", "data.max_history=8"]
    folder = _prepare(*words)
    config: Any = config_io.load("recsys", [*SETTINGS, *words], site=False).config
    task = load_recipe("recsys").make_task(config, folder)
    (row,) = task.rows("train").take(np.array([0]))
    assert len(row.items) == len(row.targets) == 8
    assert row.before.tolist() == list(range(1, 9))
