"""Which rows the rehearsal goes through, and plans count on."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft_job.data.heaviest import accumulates, heaviest_rows
from sft_job.data.packing import PackSettings, plan_batch

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def lengths_of(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@given(LENGTHS, st.integers(1, 8), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_no_micro_batch_of_rows_is_larger(values: list[int], rows: int, batch_rows: int, dp: int, pack: bool):
    lengths, settings = lengths_of(values), PackSettings(rows=rows, pack=pack)
    heaviest = int(lengths[heaviest_rows(lengths, settings, batch_rows)].sum())
    for first in range(0, len(values), batch_rows):
        plan = plan_batch(lengths, list(range(len(values)))[first : first + batch_rows], dp, settings)
        assert all(int(lengths[micro].sum()) <= heaviest for rank in plan for micro in rank)


@given(LENGTHS, st.integers(5, 120), st.integers(1, 40))
def test_packs_by_tokens_are_as_full_as_they_can_be(values: list[int], tokens: int, batch_rows: int):
    lengths, settings = lengths_of(values), PackSettings(tokens=tokens)
    rows = heaviest_rows(lengths, settings, batch_rows)
    size = int(lengths[rows].sum())
    assert len(set(rows)) == len(rows) <= batch_rows
    assert size <= max(tokens, max(values))
    assert size >= max(min(value, tokens) for value in values)
    rest = np.delete(lengths, rows)
    # Nothing that is left would still fit.
    assert len(rows) == batch_rows or max(values) >= tokens or not len(rest) or size + int(rest.min()) > tokens


def test_the_fullest_pack_need_not_hold_the_longest_row():
    assert sorted(heaviest_rows(lengths_of([6, 5, 5]), PackSettings(tokens=10), 8)) == [1, 2]


def test_a_longer_row_goes_alone():
    assert heaviest_rows(lengths_of([3, 40, 2]), PackSettings(tokens=10), 8) == [1]


def test_gradients_accumulate_where_a_step_has_several_micro_batches():
    lengths = lengths_of([10] * 16)
    assert accumulates(lengths, PackSettings(rows=2), 16, 4)
    assert not accumulates(lengths, PackSettings(rows=4), 16, 4)
    assert not accumulates(lengths, PackSettings(rows=4), 4, 1)
