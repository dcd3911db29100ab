"""Make sessions of a log, and deal their events out to the splits. Torch-free.

A row of a split is four numbers: where its session begins, its first target, the end of its targets, and its user.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dist_train.errors import ConfigError, DataError
from recipes.recsys.clock import read_moment, shown
from recipes.recsys.config import DataConfig
from recipes.recsys.log import Log

SPLITS = ("train", "validation", "test")
BEGIN, FIRST, STOP, USER = range(4)


@dataclass
class Sessions:
    """Events side by side, session by session, each in the order of time."""

    items: np.ndarray
    """[events] int32."""
    starts: np.ndarray
    """Where each session begins: [sessions + 1] int64."""
    users: np.ndarray
    """[sessions] int32."""
    times: np.ndarray | None
    """[events] int64, or None."""
    weights: np.ndarray | None
    """[events] float32, or None."""


@dataclass
class Split:
    rows: dict[str, np.ndarray]
    """Of each split: [rows, 4] int64."""
    method: str
    trained: np.ndarray
    """Events that the training sees, as history or as target: [events] bool."""
    cuts: tuple[int, int] | None = None
    """Milliseconds since 1970 at which validation and test begin."""
    notes: dict[str, int] = field(default_factory=dict)


def make_sessions(log: Log, data: DataConfig) -> Sessions:
    """Of events: one session a user, or one until a pause; an event that stands twice counts once."""
    if log.starts is not None:
        return Sessions(log.items, log.starts, log.users, None, None)
    assert log.times is not None
    order = np.lexsort((log.times, log.users))
    items, users, times = log.items[order], log.users[order], log.times[order]
    keep = _first_of_copies(items, users, times)
    if not keep.all():
        log.notes["exact_duplicates"] = int((~keep).sum())
        order, items, users, times = order[keep], items[keep], users[keep], times[keep]
    new = np.ones(len(users), dtype=bool)
    new[1:] = users[1:] != users[:-1]
    if data.session_gap_s is not None:
        new[1:] |= np.diff(times) > 1000 * data.session_gap_s
    firsts = np.flatnonzero(new)
    weights = None if log.weights is None else log.weights[order]
    return Sessions(items, np.append(firsts, len(users)).astype(np.int64), users[firsts], times, weights)


def _first_of_copies(items: np.ndarray, users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of events sorted by user and time: those that are no copy of one before. The same item can come again only
    within a tied time, so that few events need a look."""
    tied = np.zeros(len(items), dtype=bool)
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied[1:] |= same
    tied[:-1] |= same
    keep = np.ones(len(items), dtype=bool)
    chosen = np.flatnonzero(tied)
    order = chosen[np.lexsort((items[chosen], times[chosen], users[chosen]))]
    copies = (users[order][1:] == users[order][:-1]) & (times[order][1:] == times[order][:-1])
    copies &= items[order][1:] == items[order][:-1]
    keep[order[1:][copies]] = False
    return keep


def split_sessions(sessions: Sessions, log: Log, data: DataConfig) -> Split:
    """ConfigError and DataError for a split that cannot be made."""
    if data.kind == "sessions":
        split = _by_row(sessions, log, data)
    elif data.split == "leave_one_out":
        split = _leave_one_out(sessions, data)
    else:
        split = _by_time(sessions, data)
    for name in SPLITS:
        if not len(split.rows[name]):
            raise DataError(
                f"the {name} split has no event to predict ({split.method}).{_why_empty(split)}\nLower "
                "data.min_history, or change data.validation_share and data.test_share (or data.validation_from, "
                "data.test_from and data.test_until)."
            )
    return split


def _why_empty(split: Split) -> str:
    left_out = split.notes.get("events_with_too_little_history", 0)
    return f" {left_out:,} events have too few events before them (data.min_history)." if left_out else ""


def _by_time(sessions: Sessions, data: DataConfig) -> Split:
    assert sessions.times is not None
    times = sessions.times
    validation, test = _cuts(times, data)
    until = None if data.test_until is None else read_moment(data.test_until, "data.test_until")
    if until is not None and until <= test:
        raise ConfigError(
            f"data.test_until is {data.test_until}, which is not after the test split's begin, {shown(test)}.",
            "data.test_until",
        )
    period = (times >= validation).astype(np.int8) + (times >= test)
    if until is not None:
        period[times >= until] = 3
    notes = {}
    if (period == 3).any():
        notes["events_after_the_test"] = int((period == 3).sum())
    for index, name in enumerate(SPLITS):
        if not (period == index).any():
            raise DataError(
                f"the {name} split is empty: validation begins {shown(validation)}, the test {shown(test)}, and the "
                f"log goes from {shown(int(times.min()))} to {shown(int(times.max()))}."
            )
    session = np.repeat(np.arange(len(sessions.users)), np.diff(sessions.starts))
    begins = sessions.starts[session]
    # Events that are tied in time are one row: what came first among them is not known.
    new = np.ones(len(times), dtype=bool)
    new[1:] = (session[1:] != session[:-1]) | (times[1:] != times[:-1])
    firsts = np.flatnonzero(new)
    stops = np.append(firsts[1:], len(times))
    rows = {"train": _training_rows(sessions, (period == 0), data)}
    enough = firsts - begins[firsts] >= data.min_history
    for index, name in enumerate(SPLITS[1:], start=1):
        here = period[firsts] == index
        chosen = np.flatnonzero(here & enough)
        few = int((stops - firsts)[here & ~enough].sum())
        if few:
            notes["events_with_too_little_history"] = notes.get("events_with_too_little_history", 0) + few
        rows[name] = _rows(
            begins[firsts[chosen]], firsts[chosen], stops[chosen], sessions.users[session[firsts[chosen]]]
        )
    method = f"by time: validation from {shown(validation)}, test from {shown(test)}"
    return Split(rows, method, period == 0, (validation, test), notes)


def _cuts(times: np.ndarray, data: DataConfig) -> tuple[int, int]:
    """Where validation and test begin. Events of one time are never parted."""
    ordered = np.sort(times)
    count = len(ordered)
    if data.test_from is not None:
        test = read_moment(data.test_from, "data.test_from")
    else:
        test = int(ordered[min(count - 1, round(count * (1 - data.test_share)))])
    before = ordered[: np.searchsorted(ordered, test)]
    if data.validation_from is not None:
        validation = read_moment(data.validation_from, "data.validation_from")
    else:
        # As a share of the whole log, but of what lies before the test where that is shorter.
        size = min(data.validation_share * count, data.validation_share * len(before) / (1 - data.test_share))
        validation = int(before[min(len(before) - 1, round(len(before) - size))]) if len(before) else test
    if validation >= test:
        raise DataError(
            f"the validation split is empty: it would begin {shown(validation)} and the test {shown(test)}. The log "
            f"has {len(np.unique(times))} different times; choose data.validation_from and data.test_from."
        )
    return validation, test


def _leave_one_out(sessions: Sessions, data: DataConfig) -> Split:
    sizes = np.diff(sessions.starts)
    usable = np.flatnonzero(sizes >= data.min_history + 2)
    stops = sessions.starts[1:]
    trained = np.ones(len(sessions.items), dtype=bool)
    trained[stops[usable] - 1] = trained[stops[usable] - 2] = False
    rows = {"train": _training_rows(sessions, trained, data)}
    for name, back in (("validation", 2), ("test", 1)):
        first = stops[usable] - back
        rows[name] = _rows(sessions.starts[usable], first, first + 1, sessions.users[usable])
    few = int((sizes < data.min_history + 2).sum())
    notes = {"sessions_too_short_to_test": few} if few else {}
    return Split(rows, "leave one out (legacy): the last event of each session", trained, None, notes)


def _by_row(sessions: Sessions, log: Log, data: DataConfig) -> Split:
    """The rows stand in the order of time; each is a history and its target."""
    count = len(sessions.users)
    if log.is_test is None:
        tests = np.arange(count) >= count - round(count * data.test_share)
        method = "by the order of the rows: the last are the test"
    else:
        tests = log.is_test
        method = "by the order of the rows: data.test_path is the test"
    others = np.flatnonzero(~tests)
    cut = len(others) - round(len(others) * data.validation_share)
    parts = {"train": others[:cut], "validation": others[cut:], "test": np.flatnonzero(tests)}
    begins, stops = sessions.starts[:-1], sessions.starts[1:]
    trained = np.zeros(len(sessions.items), dtype=bool)
    notes: dict[str, int] = {}
    rows = {}
    for name, part in parts.items():
        enough = stops[part] - begins[part] > data.min_history
        if not enough.all():
            key = "events_with_too_little_history"
            notes[key] = notes.get(key, 0) + int((~enough).sum())
        chosen = part[enough]
        first = stops[chosen] - 1
        if name == "train":
            for row in part.tolist():
                trained[begins[row] : stops[row]] = True
            # What the first row of a user tells of its history is told by no other row.
            seen_before = np.ones(len(chosen), dtype=bool)
            seen_before[np.unique(sessions.users[chosen], return_index=True)[1]] = False
            # No more than are read, or a target's own history would be cut away.
            earliest = np.maximum(begins[chosen] + data.min_history, stops[chosen] - data.max_history)
            first = np.where(seen_before, first, np.minimum(earliest, first))
        rows[name] = _rows(begins[chosen], first, stops[chosen], sessions.users[chosen])
    return Split(rows, method, trained, None, notes)


def _training_rows(sessions: Sessions, trained: np.ndarray, data: DataConfig) -> np.ndarray:
    """The training events of each session are its first ones. A long session makes several rows, each with half of
    its events read before as context."""
    counts = np.diff(np.append(0, np.cumsum(trained))[sessions.starts])
    longest, stride = data.max_history, max(1, data.max_history // 2)
    begins, ends = sessions.starts[:-1], sessions.starts[:-1] + counts
    firsts, users, room = begins + data.min_history, sessions.users, longest
    parts = [np.zeros((0, 4), dtype=np.int64)]
    while True:
        going = firsts < ends
        begins, firsts, ends, users = begins[going], firsts[going], ends[going], users[going]
        if not len(begins):
            return np.concatenate(parts)
        stops = np.minimum(firsts + room, ends)
        parts.append(_rows(begins, firsts, stops, users))
        firsts, room = stops, stride


def _rows(*columns: np.ndarray) -> np.ndarray:
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def ranges(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers from begins to ends of each row: the row, and the number."""
    sizes = np.maximum(ends - begins, 0)
    row = np.repeat(np.arange(len(begins)), sizes)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + begins[row]
