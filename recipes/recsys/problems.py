"""What is wrong with the user's rows: collected, so that one message names the first ones and counts all."""

from __future__ import annotations

from dist_train.errors import DataError

_SHOWN = 20


class Problems:
    """Of one kind of file. Add what is wrong as it is found, then `check`."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def add(self, where: str, what: str) -> None:
        self._count += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(f"{where}: {what}")

    @property
    def any(self) -> bool:
        return self._count > 0

    def check(self, advice: str) -> None:
        """DataError with the first problems and how many there are, if there are any. advice: what to do."""
        if not self._count:
            return
        lines = list(self._shown)
        if self._count > len(lines):
            lines.append(f"… and {self._count - len(lines):,} more")
        raise DataError(f"{self._count:,} row(s) cannot be used:\n" + "\n".join(lines) + f"\n{advice}")
