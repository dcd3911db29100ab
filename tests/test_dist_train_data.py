"""Sample order and partition: pure functions whose properties every strategy relies on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data import Schedule, epoch_order, num_micro_batches, padding_share, partition, prefetch, row_seeds


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 100, 8192, 8193, 40_000])
def test_an_epoch_holds_every_row_once(num_rows: int) -> None:
    order = epoch_order(7, 3, num_rows, 0, num_rows)
    assert sorted(order.tolist()) == list(range(num_rows))


def test_any_part_of_the_order_is_the_same_part_of_the_whole() -> None:
    whole = epoch_order(1, 2, 30_000, 0, 30_000)
    assert np.array_equal(epoch_order(1, 2, 30_000, 8_100, 16_500), whole[8_100:16_500])


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50, 0, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_the_recorded_one() -> None:
    # A changed order would silently change every resumed run.
    assert epoch_order(0, 0, 10, 0, 10).tolist() == [6, 0, 4, 3, 8, 2, 7, 1, 5, 9]


def test_the_order_keeps_nothing_of_the_original_one() -> None:
    assert np.corrcoef(epoch_order(0, 0, 20_000, 0, 20_000), np.arange(20_000))[0, 1] == pytest.approx(0, abs=0.03)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=80),
    world_size=st.integers(1, 8),
    cap=st.integers(1, 16),
    extra=st.integers(0, 3),
)
def test_the_ranks_share_out_every_sample_once(lengths: list[int], world_size: int, cap: int, extra: int) -> None:
    count = num_micro_batches(len(lengths), world_size, cap) + extra
    parts = partition(np.array(lengths), world_size, count, cap)
    assert len(parts) == world_size
    assert {len(rank) for rank in parts} == {count}
    rows = [int(row) for rank in parts for micro_batch in rank for row in micro_batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(len(micro_batch) <= cap for rank in parts for micro_batch in rank)


def test_cutting_by_length_leaves_little_padding_and_no_idle_rank() -> None:
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(3.4, 0.8, 64)), 2, 192).astype(int)
    parts = partition(lengths, 2, 4, 32)
    sizes = [sum(len(rows) * lengths[rows].max() for rows in rank) for rank in parts]
    assert padding_share(lengths, parts) < 0.2
    assert max(sizes) / (sum(sizes) / 2) < 1.1


def test_the_last_batch_of_an_epoch_is_short_and_the_next_epoch_starts_anew() -> None:
    schedule = Schedule(num_rows=10, global_batch_size=4, seed=0)
    assert [len(schedule.rows_of(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [schedule.samples_before(step) for step in range(7)] == [0, 4, 8, 10, 14, 18, 20]


def test_row_seeds_depend_on_the_row_and_not_on_its_place() -> None:
    ids = np.array([5, 9, 2])
    assert np.array_equal(row_seeds(0, 1, ids)[::-1], row_seeds(0, 1, ids[::-1].copy()))
    assert len({*row_seeds(0, 1, ids).tolist(), *row_seeds(0, 2, ids).tolist()}) == 6


def test_prefetch_keeps_the_order_and_raises_an_error_where_it_was_due() -> None:
    def make(step: int) -> int:
        if step == 3:
            raise ValueError("step 3")
        return step

    items = prefetch(make, 0, 10)
    assert [next(items), next(items), next(items)] == [0, 1, 2]
    with pytest.raises(ValueError, match="step 3"):
        next(items)
