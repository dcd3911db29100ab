"""How far a preparation is: lines on a pipe, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from recipes.defect_detection import progress
from recipes.defect_detection.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _count_to(total: int) -> list[str]:
    said: list[str] = []
    with Progress(said.append, "images read", total) as counter:
        for _ in range(total // 500):
            counter.advance(500)
    return said


def test_lines_say_how_far_it_is_and_the_end_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SAY_EVERY_S", 0.0)
    said = _count_to(1500)
    assert said[0].startswith("data           images read: 500 of 1,500, ")
    assert said[0].endswith(" s left")
    assert said[-1].startswith("data           images read: 1,500 in ")
    monkeypatch.setattr(progress, "_SAY_EVERY_S", 60.0)
    assert len(_count_to(1500)) == 1


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_SHOW_AFTER_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    assert len(_count_to(1500)) == 1
    assert "images read" in terminal.getvalue()
    assert "/1500" in terminal.getvalue()


def test_what_fails_is_not_told_as_done() -> None:
    said: list[str] = []
    with pytest.raises(ValueError), Progress(said.append, "images read", 10):
        raise ValueError
    assert said == []
