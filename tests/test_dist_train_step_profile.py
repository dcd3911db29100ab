"""Spans of time: what of some lies outside others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.step_profile import Span, _without

SPANS = st.lists(st.integers(0, 60), min_size=0, max_size=12, unique=True).map(
    lambda ends: [(float(a), float(b)) for a, b in zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False)]
)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ([(0, 10)], [(2, 3), (5, 6)], [(0, 2), (3, 5), (6, 10)]),
        ([(0, 4), (6, 10)], [(3, 7)], [(0, 3), (7, 10)]),
        ([(2, 4)], [(0, 10)], []),
        ([(2, 4)], [], [(2, 4)]),
    ],
)
def test_a_span_that_lies_in_another_is_taken_out(first: list[Span], second: list[Span], left: list[Span]) -> None:
    assert _without(first, second) == left


@given(SPANS, SPANS)
def test_every_moment_is_kept_or_taken_as_counting_says(first: list[Span], second: list[Span]) -> None:
    def inside(spans: list[Span], moment: float) -> bool:
        return any(start <= moment < end for start, end in spans)

    left = _without(first, second)
    for moment in range(60):
        middle = moment + 0.5
        assert inside(left, middle) == (inside(first, middle) and not inside(second, middle))
