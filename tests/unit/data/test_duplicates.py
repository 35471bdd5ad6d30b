from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_job.data import duplicates
from sft_job.data.cache import CacheSpec, open_or_build
from sft_job.data.duplicates import later_duplicates
from tests.unit.data.conftest import write


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2**64 - 3, 2**64 - 1)), max_size=40), st.integers(1, 9))
def test_rows_that_an_earlier_row_equals(rows: list[tuple[int, int]], at_once: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_ROWS_AT_ONCE", at_once)
        path = Path(folder) / "hashes"
        np.array(rows, dtype=np.uint64).tofile(path)
        found = later_duplicates(path, len(rows))
    assert sorted(found.tolist()) == [index for index, row in enumerate(rows) if row in rows[:index]]


def test_duplicates_are_counted_in_the_file_of_the_later_row(spec: Callable[..., CacheSpec], tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", prompt=["p", "q", "p"], response=["r", "r", "r"])
    # The same ids in all, and another one trained: what a prompt and its response say is not the same.
    second = write(tmp_path / "b.parquet", prompt=["q", "p", None, "p"], response=["r", "s", "r", "r"])
    report = open_or_build(spec(first, second), tmp_path / "cache", 1).report
    assert report["duplicates"] == 3
    assert [file["duplicates"] for file in report["files"]] == [1, 2]


def test_equal_ids_with_other_spans_are_no_duplicates(spec: Callable[..., CacheSpec], tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = write(tmp_path / "a.parquet", prompt=["a b", "a"], response=[" c", " b c"])
    cache = open_or_build(spec(file, chat_template=template), tmp_path / "cache", 1)
    assert cache.row(0).ids.tolist() == cache.row(1).ids.tolist()
    assert cache.row(0).trained.tolist() != cache.row(1).trained.tolist()
    assert cache.report["duplicates"] == 0
