"""What a scaling study says of measured steps, and what its fit predicts."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.scaling import Repeat, Size, fit, summarise


def _repeat(step_s: float, **other: Any) -> Repeat:
    values: dict[str, Any] = {
        "step_s": (step_s,) * 10,
        "samples": 640,
        "tokens": 6400,
        "input_wait_share": 0.0,
        "padding_share": 0.1,
        "loss": 1.0,
        "memory_gib": 0.5,
        "predicted_gib": 0.5,
        "split": None,
        "shares_one_host": True,
        "load": 0.0,
        "clock_mhz": None,
    }
    return Repeat(**{**values, **other})


def _sizes(*ranks: int, nodes: int = 1) -> list[Size]:
    return [Size("ddp", nodes, each // nodes) for each in ranks]


def test_speed_up_and_efficiency_are_against_the_smallest_size() -> None:
    one, two = _sizes(1, 2)
    entries = summarise({one: [_repeat(0.1)] * 3, two: [_repeat(0.06)] * 3}, "strong", 3.6, cores=2)
    assert [entry["samples_per_s"] for entry in entries] == pytest.approx([640, 640 / 0.6])
    assert entries[1]["speed_up"] == pytest.approx(0.1 / 0.06)
    assert entries[1]["efficiency"] == pytest.approx(0.1 / 0.06 / 2)
    assert entries[0]["cost_per_million_samples"] == pytest.approx(1e6 / 640 / 1000)
    assert entries[1]["cost_per_million_samples"] == pytest.approx(2 * 1e6 / (640 / 0.6) / 1000)
    assert [entry["flags"] for entry in entries] == [[], []]


def test_each_strategy_is_held_against_its_own_smallest_size() -> None:
    sizes = [Size(name, 1, ranks) for name in ("ddp", "zero2") for ranks in (1, 2)]
    steps = [0.1, 0.05, 0.2, 0.1]
    entries = summarise({s: [_repeat(t)] for s, t in zip(sizes, steps, strict=True)}, "strong", None, cores=2)
    assert [entry["speed_up"] for entry in entries] == pytest.approx([1, 2, 1, 2])


@pytest.mark.parametrize(
    ("repeats", "nodes", "cores", "mode", "flag"),
    [
        ([_repeat(0.1), _repeat(0.11)], 1, 2, "strong", "its repeats lie"),
        ([_repeat(0.1)], 1, 2, "strong", "measured once"),
        ([_repeat(0.1)] * 2, 1, 1, "strong", "2 ranks share 1 cores"),
        ([_repeat(0.1)] * 2, 2, 2, "strong", "its 2 nodes share one host"),
        ([_repeat(0.1, loss=1.001)] * 2, 1, 2, "strong", "its last loss, 1.001, is not the first size's, 1"),
        ([_repeat(0.1, loss=None)] * 2, 1, 2, "strong", "its loss was not compared"),
    ],
)
def test_what_a_reader_must_know_is_flagged(
    repeats: list[Repeat], nodes: int, cores: int, mode: str, flag: str
) -> None:
    measured = {Size("ddp", 1, 1): [_repeat(0.1)] * 2, Size("ddp", nodes, 2 // nodes): repeats}
    flags = summarise(measured, mode, None, cores)[1]["flags"]
    assert len(flags) == 1
    assert flags[0].startswith(flag)


def test_a_size_without_a_result_is_left_out_and_weak_sizes_may_differ_in_loss() -> None:
    one, two, four = _sizes(1, 2, 4)
    measured = {one: [_repeat(0.1)] * 2, two: [], four: [_repeat(0.1, loss=2.0)] * 2}
    entries = summarise(measured, "weak", None, cores=4)
    assert [entry["ranks"] for entry in entries] == [1, 4]
    assert entries[1]["flags"] == []


def test_the_fit_finds_what_the_steps_were_made_of_and_predicts_the_next_size() -> None:
    ranks = (1, 2, 4, 8, 16)
    entries = [{"ranks": n, "step_s": 0.02 + 0.4 / n + 0.005 * (n.bit_length() - 1)} for n in ranks]
    found = fit(entries, "strong", [32])
    assert found is not None
    assert list(found["terms"].values()) == pytest.approx([0.02, 0.4, 0.005])
    assert max(map(abs, found["residuals"])) < 1e-9
    assert found["has_freedom"]
    assert found["predictions"][0]["step_s"] == pytest.approx(0.02 + 0.4 / 32 + 0.005 * 5)


def test_a_fit_of_two_sizes_says_that_it_cannot_be_wrong() -> None:
    found = fit([{"ranks": 1, "step_s": 0.4}, {"ranks": 2, "step_s": 0.25}], "strong", [4])
    assert found is not None
    assert not found["has_freedom"]
    assert found["predictions"][0]["step_s"] == pytest.approx(0.1 + 0.3 / 4)
    assert fit([{"ranks": 1, "step_s": 0.4}], "strong", [4]) is None
