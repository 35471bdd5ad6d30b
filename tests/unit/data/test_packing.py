from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.config.schema import JobConfig
from sft_job.data.packing import PackSettings, Plan, pack_settings, plan_batch

lengths_lists = st.lists(st.integers(1, 5000), min_size=0, max_size=60)
dp_sizes = st.integers(1, 9)
limits = st.one_of(
    st.builds(PackSettings, rows=st.integers(1, 9), pack=st.booleans()),
    st.builds(PackSettings, tokens=st.integers(1, 9000), pack=st.booleans()),
)


def plan(lengths: list[int], dp_size: int, settings: PackSettings) -> Plan:
    # Row ids that are not their places in the batch.
    table = np.array([7] * 3 + lengths, dtype=np.int32)
    return plan_batch(table, list(range(3, len(table))), dp_size, settings)


@given(lengths_lists, dp_sizes, limits)
def test_each_row_once_and_equally_many_micro_batches(lengths: list[int], dp_size: int, settings: PackSettings) -> None:
    result = plan(lengths, dp_size, settings)
    assert len(result) == dp_size
    assert len({len(micro_batches) for micro_batches in result}) == 1
    rows = Counter(row for rank in result for rows in rank for row in rows)
    assert rows == Counter(range(3, 3 + len(lengths)))
    assert result == plan(lengths, dp_size, settings)


@given(lengths_lists, dp_sizes, limits)
def test_limits_hold(lengths: list[int], dp_size: int, settings: PackSettings) -> None:
    for rows in (rows for rank in plan(lengths, dp_size, settings) for rows in rank):
        assert rows == sorted(rows)
        assert settings.pack or len(rows) <= 1
        assert settings.rows is None or len(rows) <= settings.rows
        tokens = sum(lengths[row - 3] for row in rows)
        assert settings.tokens is None or tokens <= settings.tokens or len(rows) == 1


@given(lengths_lists, dp_sizes, st.integers(1, 9), st.booleans())
def test_rows_take_the_fewest_forwards(lengths: list[int], dp_size: int, rows: int, pack: bool) -> None:
    result = plan(lengths, dp_size, PackSettings(rows=rows, pack=pack))
    per_rank = -(-len(lengths) // dp_size)
    assert len(result[0]) == -(-per_rank // (rows if pack else 1))


@given(lengths_lists, dp_sizes, st.integers(1, 9000))
def test_a_token_budget_is_used_well(lengths: list[int], dp_size: int, tokens: int) -> None:
    result = plan(lengths, dp_size, PackSettings(tokens=tokens))
    alone = sum(length > tokens for length in lengths)
    fitting = sum(length for length in lengths if length <= tokens)
    # First fit leaves at most one bin half empty or emptier.
    most = alone + (2 * fitting) // tokens + 1
    assert len(result[0]) <= -(-most // dp_size)


@given(lengths_lists, dp_sizes, limits)
def test_alike_micro_batches_meet_the_longest_first(lengths: list[int], dp_size: int, settings: PackSettings) -> None:
    table = np.array([7] * 3 + lengths, dtype=np.int32)
    costs = [[settings.cost(table[rows]).sum() for rows in rank] for rank in plan(lengths, dp_size, settings)]
    rounds = list(zip(*costs, strict=True))
    for earlier, later in itertools.pairwise(rounds):
        assert min(earlier) >= max(later)


def test_ranks_wait_little_for_one_another() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1, 512).astype(np.int32) + 1
    settings = PackSettings(rows=4)
    ideal = settings.cost(lengths).sum() / 8

    def seconds(planned: Plan) -> float:
        # Sharded weights are gathered by all ranks at once: in each round all wait for the costliest.
        costs = [[settings.cost(lengths[rows]).sum() for rows in rank] for rank in planned]
        return sum(max(in_round) for in_round in zip(*costs, strict=True))

    as_they_come = [
        [list(range(rank * 64 + first, rank * 64 + first + 4)) for first in range(0, 64, 4)] for rank in range(8)
    ]
    assert seconds(plan_batch(lengths, range(512), 8, settings)) < 1.15 * ideal
    assert seconds(as_they_come) > 1.8 * ideal


small_limits = st.builds(PackSettings, tokens=st.integers(3, 12))


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(1, 3), small_limits)
def test_tight_token_budgets_hold(lengths: list[int], dp_size: int, settings: PackSettings) -> None:
    test_limits_hold.hypothesis.inner_test(lengths, dp_size, settings)  # type: ignore[attr-defined]


def test_a_budget_that_even_costs_would_break() -> None:
    # Evenly spread, one of the two bins would hold 3 + 2 + 2 tokens.
    assert plan([3, 3, 2, 2, 2], 1, PackSettings(tokens=6)) == [[[3, 4], [5, 6, 7]]]


def test_the_costliest_rows_are_placed_first() -> None:
    assert plan([1, 1, 2], 2, PackSettings(rows=2)) == [[[5]], [[3, 4]]]


def test_few_long_rows_do_not_leave_ranks_without_work() -> None:
    # All of it fits into one budget, but there are four ranks.
    assert [len(rank[0]) for rank in plan([10, 10, 10, 10], 4, PackSettings(tokens=1000))] == [1, 1, 1, 1]
    # One row of 128K beside eight of 8K: no rank waits through more than five forwards.
    result = plan([128_000] + [8_000] * 8, 2, PackSettings(tokens=8_192))
    assert [len(rank) for rank in result] == [5, 5]


def test_more_ranks_than_rows() -> None:
    assert sorted(plan([5, 6], 4, PackSettings(rows=4))) == [[[]], [[]], [[3]], [[4]]]


def test_settings_of_a_config() -> None:
    config = JobConfig(ulysses_sequence_parallel_size=4, use_remove_padding=False)
    config.data.micro_batch_size_per_gpu = 3
    assert pack_settings(config) == PackSettings(rows=3, pack=False)
    config.data.use_dynamic_bsz = True
    config.data.max_token_len_per_gpu = 1000
    config.use_remove_padding = True
    assert pack_settings(config) == PackSettings(tokens=4000)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_many_rows_of_half_a_budget_are_planned_at_once(dp_size: int) -> None:
    # A search that adds one round at a time would take minutes here.
    result = plan([600] * 2000, dp_size, PackSettings(tokens=1000))
    assert len(result[0]) == -(-2000 // dp_size)
