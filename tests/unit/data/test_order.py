from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.data.order import FileOrder, RowOrder, epoch_order, step_rows, steps_per_epoch

seeds = st.integers(-(2**40), 2**40)
counts = st.integers(1, 200)


@given(seeds, st.integers(0, 50), counts)
def test_an_epoch_holds_every_row_once(seed: int, epoch: int, num_rows: int) -> None:
    order = epoch_order(seed, epoch, num_rows)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_rows))
    assert order.tolist() == epoch_order(seed, epoch, num_rows).tolist()


@given(seeds, counts, st.integers(1, 250), st.integers(1, 3))
def test_steps_cut_each_epochs_permutation(seed: int, num_rows: int, batch_size: int, epochs: int) -> None:
    order = RowOrder(seed, num_rows, batch_size)
    assert order.steps_per_epoch == steps_per_epoch(num_rows, batch_size)
    for epoch in range(epochs):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.rows(step).tolist() for step in steps]
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert [row for batch in batches for row in batch] == epoch_order(seed, epoch, num_rows).tolist()
        assert {order.epoch(step) for step in steps} == {epoch}


@given(seeds, counts, st.integers(1, 250), st.integers(0, 500))
def test_any_step_can_be_asked_for_at_once(seed: int, num_rows: int, batch_size: int, step: int) -> None:
    walked = RowOrder(seed, num_rows, batch_size)
    for earlier in range(max(0, step - 3), step):
        walked.rows(earlier)
    epoch, rows = step_rows(seed, step, num_rows, batch_size)
    assert epoch == walked.epoch(step)
    assert rows.tolist() == walked.rows(step).tolist()


def test_the_order_is_this_one_for_good() -> None:
    assert epoch_order(1, 0, 8).tolist() == GOLDEN
    assert epoch_order(1, 1, 8).tolist() != GOLDEN
    assert epoch_order(2, 0, 8).tolist() != GOLDEN


GOLDEN = [2, 4, 7, 5, 0, 6, 3, 1]


def test_all_permutations_are_about_equally_likely() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        permutation = tuple(epoch_order(seed, 0, 3).tolist())
        seen[permutation] = seen.get(permutation, 0) + 1
    assert len(seen) == 6
    assert all(850 < count < 1150 for count in seen.values())


@given(counts, st.integers(1, 250))
def test_validation_takes_every_row_once_in_the_files_order(num_rows: int, batch_size: int) -> None:
    order = FileOrder(num_rows, batch_size)
    rows = [row for step in range(order.steps_per_epoch) for row in order.rows(step).tolist()]
    assert rows == list(range(num_rows))
    assert order.rows(order.steps_per_epoch).tolist() == []


@pytest.mark.parametrize(("rows", "batch"), [(0, 4), (4, 0)])
def test_no_rows_or_no_batch(rows: int, batch: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RowOrder(1, rows, batch)
