"""Sessions are split by the clock: no event of the training is as late as one that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.errors import ConfigError, DataError
from recipes.recsys import leaks
from recipes.recsys.config import DataConfig
from recipes.recsys.log import Log
from recipes.recsys.sessions import BEGIN, FIRST, STOP, USER, Sessions, Split, make_sessions, split_sessions

DAY = 86_400_000


def _log(users: list[int], items: list[int], days: list[float]) -> Log:
    times = (np.array(days) * DAY).astype(np.int64)
    names = [f"u{index}" for index in range(max(users) + 1)]
    return Log(np.array(items, np.int32), np.array(users, np.int32), names, [str(i) for i in range(99)], times)


def _split(log: Log, **keys: Any) -> tuple[Sessions, Split]:
    data = DataConfig(path="log.csv", **keys)
    sessions = make_sessions(log, data)
    return sessions, split_sessions(sessions, log, data)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), min_size=40, max_size=120), st.integers(1, 6))
def test_no_training_event_is_as_late_as_a_later_splits(events: list[tuple[int, int]], longest: int) -> None:
    users, days = [user for user, _ in events], [float(day) for _, day in events]
    log = _log(users, list(range(len(events))), days)
    log.item_names = [str(index) for index in range(len(events))]
    try:
        sessions, split = _split(log, max_history=longest)
    except DataError:
        return  # too few different days
    assert sessions.times is not None
    latest = {name: sessions.times[rows[:, STOP] - 1].max() for name, rows in split.rows.items()}
    earliest = {name: sessions.times[rows[:, FIRST]].min() for name, rows in split.rows.items()}
    assert latest["train"] < split.cuts[0] <= earliest["validation"]  # type: ignore[index]
    assert latest["validation"] < split.cuts[1] <= earliest["test"]  # type: ignore[index]
    covered = np.zeros(len(events), dtype=int)
    for begin, first, stop, _ in split.rows["train"].tolist():
        assert stop - 1 - longest <= first  # every target has the state before it among what is read
        assert begin < first
        covered[first:stop] += 1
    assert covered.max() <= 1


def test_targets_of_one_moment_are_one_row_and_never_parted_by_the_cut() -> None:
    users = [0] * 10 + [1] * 4
    days = [0, 1, 2, 3, 4, 5, 8, 8, 8, 8, 0, 6, 9, 9]
    sessions, split = _split(_log(users, list(range(14)), days))
    test = split.rows["test"]
    assert sessions.items[test[0, FIRST] : test[0, STOP]].tolist() in ([6, 7, 8, 9], [12, 13])
    for begin, first, stop, _ in test.tolist():
        assert begin < first
        assert len(set(sessions.times[first:stop].tolist())) == 1  # type: ignore[index]


def test_a_pause_begins_a_session_that_knows_nothing_of_those_before() -> None:
    log = _log([0] * 12, list(range(12)), [0, 0.1, 0.2, 3, 3.1, 3.2, 6, 6.1, 6.2, 9, 9.1, 9.2])
    _, split = _split(log, session_gap_s=86_400, test_from="1970-01-10")
    assert split.rows["test"][:, [BEGIN, FIRST]].tolist() == [[9, 10], [9, 11]]
    _, whole = _split(log)
    assert set(whole.rows["test"][:, BEGIN].tolist()) == {0}


def test_an_event_that_stands_twice_counts_once() -> None:
    log = _log([0, 0, 0, 1, 1], [5, 7, 5, 5, 5], [1, 1, 1, 1, 2])
    sessions = make_sessions(log, DataConfig(path="log.csv"))
    assert sessions.items.tolist() == [5, 7, 5, 5]
    assert log.notes == {"exact_duplicates": 1}


def test_leave_one_out_takes_the_last_event_of_each_user() -> None:
    log = _log([0] * 5 + [1] * 2, list(range(7)), [0, 1, 2, 3, 4, 0, 9])
    sessions, split = _split(log, split="leave_one_out")
    assert sessions.items[split.rows["test"][:, FIRST]].tolist() == [4]
    assert sessions.items[split.rows["validation"][:, FIRST]].tolist() == [3]
    assert split.trained.tolist() == [True] * 3 + [False] * 2 + [True] * 2
    assert split.notes == {"sessions_too_short_to_test": 1}


def test_events_with_too_little_before_them_are_left_out_and_counted() -> None:
    log = _log([0, 0, 0, 0, 0, 0, 1], list(range(7)), [0, 1, 2, 3, 8, 9, 9])
    _, split = _split(log)
    assert split.rows["test"][:, USER].tolist() == [0]
    assert split.notes["events_with_too_little_history"] == 1
    _, all_of_them = _split(log, min_history=0)
    assert sorted(all_of_them.rows["test"][:, USER].tolist()) == [0, 1]


def test_a_test_period_without_events_is_refused() -> None:
    log = _log([0] * 10, list(range(10)), list(range(10)))
    with pytest.raises(DataError, match=r"test split is empty.*the log goes from 1970-01-01 to 1970-01-10"):
        _split(log, test_from="1999-01-01")
    with pytest.raises(ConfigError, match=r"data\.test_until is 1970-01-02, which is not after"):
        _split(log, test_until="1970-01-02")


def test_a_training_event_after_the_cut_is_found() -> None:
    sessions, split = _split(_log([0] * 10, list(range(10)), list(range(10))))
    leaks.check_split(sessions, split)
    split.trained[-1] = True
    with pytest.raises(DataError, match="1 events at or after the cut"):
        leaks.check_split(sessions, split)


def test_a_training_row_whose_target_lies_after_the_cut_is_found() -> None:
    sessions, split = _split(_log([0] * 10, list(range(10)), list(range(10))))
    split.rows["train"][-1, STOP] = 10
    with pytest.raises(DataError, match="at or after the cut"):
        leaks.check_split(sessions, split)


def test_repeats_are_counted_and_not_refused() -> None:
    sessions, split = _split(_log([0] * 10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 3], list(range(10))))
    assert leaks.check_split(sessions, split)["repeat_targets"] == 1
