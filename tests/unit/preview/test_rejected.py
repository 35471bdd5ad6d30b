from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.contract import ExitCode
from sft_job.data.cache import CacheSpec, TokenCache
from sft_job.errors import ProblemsError
from sft_job.preview.rejected import find_file, reject_reason

FILES = [Path("/data/a/train.parquet"), Path("/data/b/train.parquet"), Path("/data/c/other.parquet")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("other.parquet:7", (2, 7)),
        ("b/train.parquet:0", (1, 0)),
        ("/data/a/train.parquet:12", (0, 12)),
        ("./c/other.parquet:3", (2, 3)),
    ],
)
def test_a_file_by_the_end_of_its_path(text: str, found: tuple[int, int]) -> None:
    assert find_file(text, FILES) == found


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("train.parquet:0", ExitCode.DATA, "several files end like this: /data/a/train.parquet, /data/b/train.parquet"),
        ("rain.parquet:0", ExitCode.DATA, "no such file among: /data/a/train.parquet"),
        ("other.parquet", ExitCode.CONFIG, "must be FILE:ROW"),
        ("other.parquet:x", ExitCode.CONFIG, "must be FILE:ROW"),
        ("other.parquet:-1", ExitCode.CONFIG, "must be FILE:ROW"),
    ],
)
def test_what_names_no_row(text: str, code: ExitCode, told: str) -> None:
    with pytest.raises(ProblemsError, match=told) as caught:
        find_file(text, FILES)
    assert caught.value.code == code
    assert "for example --row" in str(caught.value)


def test_a_file_that_is_listed_twice() -> None:
    assert find_file("other.parquet:1", [FILES[2], FILES[2]]) == (0, 1)


def test_reasons(spec: CacheSpec, tmp_path: Path) -> None:
    texts = {"prompt": ["a"] * 5, "response": ["fine", None, "b " * 500, "", "fine"]}
    pq.write_table(pa.table(texts), tmp_path / "a.parquet", row_group_size=2)
    subject = replace(spec, files=(tmp_path / "a.parquet",), max_length=100)
    assert reject_reason(subject, 0, 0) is None
    assert str(reject_reason(subject, 0, 1)).startswith("no_text: ")
    assert str(reject_reason(subject, 0, 2)).startswith("overlong: ")
    short = replace(subject, max_length=5, truncation="right")
    assert str(reject_reason(short, 0, 4)).startswith("without_target: no token to train on is left")
    with pytest.raises(ProblemsError, match="has 5 rows, numbered from 0 to 4"):
        reject_reason(subject, 0, 5)


def test_a_file_that_cannot_be_read(spec: CacheSpec, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ProblemsError, match=r"a.parquet:3\n +cannot be read") as caught:
        reject_reason(replace(spec, files=(tmp_path / "a.parquet",)), 0, 3)
    assert caught.value.code == ExitCode.DATA


def test_the_cache_finds_rows_by_their_origin(cache: TokenCache) -> None:
    for index in range(len(cache)):
        assert cache.find(*cache.origin(index)) == [index]
    assert cache.find(cache.files[0], 17) == []
    assert cache.find(Path("elsewhere"), 0) == []
