"""Rows that move between micro-batches: what is waited shrinks, limits hold, and rows in any order give equal costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.data.evening import Limits, even_out, waited
from sft_job.data.packing import PackSettings, plan_batch

SETTINGS = PackSettings(tokens=72_000, quadratic=4.8e-5)


def waited_by(lengths: np.ndarray, dp: int, settings: PackSettings) -> float:
    plan = plan_batch(lengths, range(len(lengths)), dp, settings)
    return waited(np.array([[settings.cost(lengths[np.array(ids, int)]).sum() for ids in rank] for rank in plan]))


@pytest.mark.parametrize(("dp", "most"), [(1, 0.0), (2, 0.01), (4, 0.02)])
def test_a_long_tailed_batch_is_even_to_a_hundredth(dp, most) -> None:
    """Median 2K, tail to 32K, 262,144 tokens a step, with a tenth of room in the micro-batches."""
    for seed in range(10):
        drawn = np.random.default_rng(seed).lognormal(np.log(2048), 1.0, 400).clip(64, 32_768).astype(np.int64)
        lengths = drawn[: np.searchsorted(drawn.cumsum(), 262_144)]
        assert waited_by(lengths, dp, SETTINGS) <= most + 1e-12


batches = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 8))


@given(batches, st.integers(40, 90))
def test_it_takes_no_longer_and_keeps_rows_and_limits(batch, tokens) -> None:
    values, at_once, most_rows = batch
    lengths = np.array(values)
    costs = PackSettings(quadratic=0.05).cost(lengths)
    count = -(-len(values) // at_once) * at_once
    bins = [[row] for row in range(len(values))] + [[] for _ in range(count - len(values))]
    found = even_out(bins, at_once, Limits(lengths, costs, most_rows, tokens))
    assert sorted(row for rows in found for row in rows) == list(range(len(values)))
    assert all(len(rows) <= most_rows and lengths[rows].sum() <= tokens for rows in found)

    def taken(each: list[list[int]]) -> float:
        return sum(sorted((costs[rows].sum() for rows in each), reverse=True)[::at_once])

    assert taken(found) <= taken(bins) * (1 + 1e-12)


def test_companions_of_a_long_row_are_filled_up_to_it() -> None:
    """One row that costs as much as eight: what the second round held fits beside it in the first."""
    lengths = np.array([8, 2, 2, 2, 2])
    found = even_out([[0], [1], [2], [3, 4]], 2, Limits(lengths, lengths.astype(float), 9, 8))
    assert [sum(lengths[row] for row in rows) for rows in found] == [8, 8, 0, 0]


def test_what_is_waited() -> None:
    assert waited(np.array([[4.0, 1.0], [2.0, 1.0]])) == pytest.approx(5 / 4 - 1)
    assert waited(np.zeros((2, 1))) == 0.0
