from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rows import MIXED
from benchmarks.token_rows import TokenRows
from benchmarks.tokens import SEED, Tokens, draw_ids, read_in_step_order, write_tokens
from sft_job.data.order import RowOrder


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 90), length=st.integers(64, 40_000), share=st.floats(0.05, 1.0), steps=st.integers(1, 3))
def test_every_step_of_mixed_lengths_has_exactly_its_tokens(rows: int, length: int, share: float, steps: int) -> None:
    total = max(rows, int(rows * length * share))
    tokens = Tokens(rows, length, total, median=max(1, length // 16))
    for lengths in tokens.lengths(steps):
        assert len(lengths) == rows
        assert sum(lengths) == total == tokens.of_step
        assert min(lengths) >= 1
        assert max(lengths) <= length


def test_mixed_lengths_are_those_of_the_row_and_the_same_each_time() -> None:
    drawn = MIXED.lengths(20)
    assert drawn == MIXED.lengths(20)
    assert drawn[0] != drawn[1]
    every = np.concatenate([np.array(step) for step in drawn])
    assert 1700 < np.median(every) < 2300
    assert every.max() > 16_000


def test_tiny_keeps_the_proportions() -> None:
    tiny = MIXED.tiny()
    assert (tiny.rows, tiny.of_step * 64) == (MIXED.rows, MIXED.of_step)


def test_the_job_meets_the_rows_of_each_step_in_that_step(tmp_path) -> None:
    tokens = Tokens(rows=3, length=40, total=70, median=12)
    path = write_tokens(tmp_path / "rows.parquet", tokens, 100, steps=4)
    lengths = [len(ids) for ids in pq.read_table(path).column("input_ids").to_pylist()]
    order = RowOrder(SEED, len(lengths), tokens.rows)
    assert [[lengths[row] for row in order.rows(step)] for step in range(4)] == tokens.lengths(4)
    in_order = [len(ids) for ids in read_in_step_order(path, tokens.rows).column("input_ids").to_pylist()]
    assert in_order == [length for step in tokens.lengths(4) for length in step]


def test_a_file_that_is_there_is_kept(tmp_path) -> None:
    tokens = Tokens(rows=2, length=16)
    path = write_tokens(tmp_path / "rows.parquet", tokens, 50, steps=2)
    before = path.stat().st_mtime_ns
    assert write_tokens(path, tokens, 50, steps=2).stat().st_mtime_ns == before


def test_every_second_token_follows_from_the_one_before() -> None:
    rows = draw_ids([31, 64], 200, np.random.default_rng(3))
    followers: dict[int, set[int]] = {}
    for ids in rows:
        assert ids.dtype == np.int32
        assert ids.min() >= 0
        assert ids.max() < 200
        for first, second in zip(ids[::2].tolist(), ids[1::2].tolist(), strict=False):
            followers.setdefault(first, set()).add(second)
    assert all(len(each) == 1 for each in followers.values())
    assert len({ids[0] for ids in draw_ids([2] * 50, 200, np.random.default_rng(4))}) > 5


def test_the_data_set_class_gives_every_token_as_trained(tmp_path) -> None:
    path = write_tokens(tmp_path / "rows.parquet", Tokens(2, 8), 50, steps=1)
    rows = TokenRows([str(path)], None, None)
    assert len(rows) == 2
    item = rows[1]
    assert item["input_ids"].tolist() == pq.read_table(path).column("input_ids")[1].as_py()
    assert item["loss_mask"].tolist() == [1] * 8
