from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.contract import ExitCode
from sft_job.data.cache import CacheSpec, open_or_build
from sft_job.data.sample import check_sample
from sft_job.errors import ProblemsError
from tests.unit.data.conftest import rows_file, write

MakeSpec = Callable[..., CacheSpec]


def grouped(path: Path, groups: list[list[tuple[str, str]]]) -> Path:
    """A file whose row groups hold these prompts and responses."""
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in groups:
            columns = [[row[0] for row in rows], [row[1] for row in rows]]
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema))
    return path


def test_all_rows_give_the_counts_of_the_cache(spec: MakeSpec, tmp_path: Path) -> None:
    files = [rows_file(tmp_path / f"{seed}.parquet", 15, seed) for seed in range(3)]
    subject = spec(*files, max_length=60, truncation="right")
    counts, notes, problems, _ = check_sample(subject, 10_000)
    report = open_or_build(subject, tmp_path / "cache", 1).report
    assert problems == []
    assert notes == report["notes"][: len(notes)]
    for name in ("rows_read", "rows_usable", "rows_without_target", "rows_truncated", "tokens", "longest_row"):
        assert getattr(counts, name) == report[name]


def test_rows_come_from_every_row_group(spec: MakeSpec, tmp_path: Path) -> None:
    """Each group has one row of a length of its own, so that the sum of tokens tells which were looked at."""
    groups = [[("p", "x " * (2**group)), *[("p", "")] * 9] for group in range(6)]
    file = grouped(tmp_path / "a.parquet", groups)
    empty = [check_sample(spec(write(tmp_path / "e.parquet", prompt=["p"], response=[""])), 1)[0].tokens]
    counts, *_ = check_sample(spec(file), 6)
    assert counts.rows_read == 6
    single = [
        check_sample(spec(write(tmp_path / "s.parquet", prompt=["p"], response=["x " * 2**group])), 1)[0].tokens
        for group in range(6)
    ]
    assert counts.tokens == sum(single)
    assert check_sample(spec(file), 12)[0].tokens == sum(single) + 6 * empty[0]


def test_of_many_row_groups_twenty_over_all_files(spec: MakeSpec, tmp_path: Path) -> None:
    files = [grouped(tmp_path / f"{name}.parquet", [[("p", "r")] * 50] * 15) for name in range(4)]
    assert check_sample(spec(*files), 1000)[0].rows_read == 1000
    assert check_sample(spec(*files), 100)[0].rows_read == 100


def test_row_groups_without_rows_take_no_place(spec: MakeSpec, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string())])
    with pq.ParquetWriter(file, schema) as writer:
        for group in range(60):
            texts = ["x"] * (group % 3 == 1)
            writer.write_table(pa.table([texts, texts], schema=schema))
    assert pq.read_metadata(file).num_row_groups == 60
    assert check_sample(spec(file), 20)[0].rows_read == 20


def test_problems_name_file_and_row_of_the_whole_data(spec: MakeSpec, tmp_path: Path) -> None:
    good = grouped(tmp_path / "good.parquet", [[("p", "r")] * 3])
    bad = grouped(tmp_path / "bad.parquet", [[("p", "r")] * 4, [("word " * 400, "r")]])
    counts, _, (problem,), _ = check_sample(spec(good, bad, max_length=50), 9)
    assert counts.rows_read == 7
    assert (problem.code, problem.subject) == (ExitCode.DATA, "data.max_length")
    assert problem.rule.startswith("(in a sample) 1 of 7 rows are longer than 50 tokens")
    assert f"{bad} row 4: " in problem.rule


def test_files_without_rows(spec: MakeSpec, tmp_path: Path) -> None:
    file = grouped(tmp_path / "empty.parquet", [[]])
    counts, notes, problems, _ = check_sample(spec(file), 10)
    assert (counts.rows_read, problems) == (0, [])
    assert notes


def test_tokenizer_that_is_not_there(spec: MakeSpec, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.parquet", 2)
    with pytest.raises(ProblemsError) as raised:
        check_sample(spec(file, tokenizer=tmp_path / "gone"), 2)
    assert raised.value.code is ExitCode.MODEL
