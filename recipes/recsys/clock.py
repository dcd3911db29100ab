"""Times as the user has them, as milliseconds since 1970 (UTC). Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from dist_train.errors import ConfigError
from recipes.recsys.problems import Problems

# Smallest numbers that are read as milli-, micro- and nanoseconds: as seconds they lie beyond the year 5000, and as the
# unit before beyond the same year.
_UNITS = ((1e17, 1e-6, "nanoseconds"), (1e14, 1e-3, "microseconds"), (1e11, 1.0, "milliseconds"), (0.0, 1e3, "seconds"))
_NAMES = [name for _, _, name in _UNITS]
DAY_MS = 86_400_000


class Clock:
    """Reads one column, whose numbers must all be of one unit."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._unit: int | None = None
        self._first = ""

    def read(self, texts: Sequence[str | None], where: Sequence[str] | Where, problems: Problems) -> np.ndarray:
        """[n] int64. What is no time is added to `problems`."""
        numbers = _numbers(texts)
        if numbers is None:
            return np.array([self._one(text, where[i], problems) for i, text in enumerate(texts)], dtype=np.int64)
        units = np.select([numbers >= least for least, _, _ in _UNITS], range(len(_UNITS)), -1)
        if self._unit is None and (units >= 0).any():
            first = int(np.argmax(units >= 0))
            self._unit, self._first = int(units[first]), where[first]
        if len(texts) and all(map(_is_date, texts)):
            # As seconds they would be hours of 1970.
            problems.add(where[0], f"{self._column} is {texts[0]}, a date without hyphens: write it as 2025-03-31")
        for index in np.flatnonzero((units != self._unit) | ~np.isfinite(numbers)).tolist():
            problems.add(where[index], self._wrong(texts[index], int(units[index])))
        factor = _UNITS[self._unit or 0][1]
        return np.where(units >= 0, np.where(np.isfinite(numbers), numbers, 0) * factor, 0).round().astype(np.int64)

    def _one(self, text: str | None, where: str, problems: Problems) -> int:
        numbers = _numbers([text])
        if numbers is not None:
            return int(self.read([text], [where], problems)[0])
        try:
            return _iso(text or "")
        except ValueError:
            what = "is empty" if text is None or not text.strip() else f"is {text!r}, which is no time"
            problems.add(where, f"{self._column} {what}")
            return 0

    def _wrong(self, text: str | None, unit: int) -> str:
        if unit < 0:
            return f"{self._column} is {text}, which is negative or not finite"
        return (
            f"{self._column} is {text}, which looks like {_NAMES[unit]}, but the times before it (first in "
            f"{self._first}) are {_NAMES[self._unit or 0]}"
        )


class Where:
    """Names rows of a file by their number, without a list of names."""

    def __init__(self, file: object, numbers: Sequence[int]) -> None:
        """numbers: of each row, from 0."""
        self._file, self._numbers = file, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> str:
        return f"{self._file}: row {self._numbers[index] + 1}"

    def of(self, chosen: Sequence[int]) -> Where:
        """The rows at these indices."""
        return Where(self._file, [self._numbers[index] for index in chosen])


def read_moment(text: str, key: str) -> int:
    """The time that a config key holds. ConfigError for what is none."""
    problems = Problems()
    value = Clock(key).read([text], [key], problems)
    if problems.any:
        raise ConfigError(
            f"{key} is {text!r}, which is no time: write it as 2025-03-31, 2025-03-31T12:00:00Z or seconds since 1970.",
            key,
        )
    return int(value[0])


def shown(moment: int) -> str:
    """A time for the user."""
    return datetime.fromtimestamp(moment / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S").removesuffix(" 00:00:00")


def _is_date(text: str | None) -> bool:
    """Whether it is a date of this time in eight digits."""
    digits = (text or "").strip()
    return len(digits) == 8 and digits.isdigit() and "1970" <= digits[:4] < "2100" and _parses(digits)


def _parses(digits: str) -> bool:
    try:
        datetime.strptime(digits, "%Y%m%d")
    except ValueError:
        return False
    return True


def _iso(text: str) -> int:
    moment = datetime.fromisoformat(text.strip())
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def _numbers(texts: Sequence[str | None]) -> np.ndarray | None:
    """[n] float64; None where one is no number."""
    try:
        return np.array(texts, dtype=np.float64) if None not in texts else None
    except ValueError:
        return None
