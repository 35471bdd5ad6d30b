"""Every class of damaged parquet: refused with file and row group or row named, never read as something else."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.checkpoint.start import Start, refuse_other_data
from sft_job.checkpoint.state import RunState, flat_config
from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.data.cache import CacheSpec, open_or_build
from sft_job.data.columns import Column, read_texts
from sft_job.data.files import footer_problems, read_footers
from sft_job.data.footer import footer_fault, has_checksums, read_groups
from sft_job.data.judge import judge_rows
from sft_job.data.pieces import read_pieces
from sft_job.data.sample import check_all, check_sample
from sft_job.errors import Problem, ProblemsError
from tests.unit.data.conftest import rows_file, words, write

MakeSpec = Callable[..., CacheSpec]
COLUMNS = [Column("data.prompt_key", "prompt"), Column("data.response_key", "response")]
ROWS = 60


def table(seed: int = 0) -> pa.Table:
    random_ = random.Random(seed)
    prompts = [f"{row} " + words(random_, 12) for row in range(ROWS)]
    return pa.table({"prompt": prompts, "response": [f"answer {row % 7}" for row in range(ROWS)]})


def parquet(compression: str = "none", dictionary: bool = True, checksums: bool = True, **more: object) -> bytes:
    """Three row groups with several pages each."""
    sink = io.BytesIO()
    options = {"row_group_size": 20, "data_page_size": 400, "write_batch_size": 4, "use_dictionary": dictionary}
    pq.write_table(table(), sink, compression=compression, write_page_checksum=checksums, **(options | more))  # type: ignore[arg-type]
    return sink.getvalue()


def read(path: Path) -> list[list[str]] | None:
    """Prompts and responses as training reads them; None where anything is refused."""
    footers = read_footers([path], COLUMNS, "data.train_files")
    if footer_problems([path], footers, "data.train_files"):
        return None
    texts: list[list[str]] = [[], []]
    for piece in read_pieces([path], footers, COLUMNS, footers[0].rows):
        if piece.gaps:
            return None
        for segment in piece.segments:
            for found, column in zip(texts, COLUMNS, strict=True):
                cells = read_texts(segment.batch(), [column])
                if not all(isinstance(cell, str) for cell in cells):
                    return None
                found += cells  # type: ignore[arg-type]
    return texts


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_no_flipped_bit_is_read_as_other_rows(compression: str, dictionary: bool, tmp_path: Path) -> None:
    """In pages with checksums, in page headers and in the footer, which have none: refused, or of no consequence."""
    good = parquet(compression, dictionary)
    file = tmp_path / "a.parquet"
    expected = [column.to_pylist() for column in table().columns]
    random_ = random.Random(f"{compression} {dictionary}")
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    places = [random_.randrange(footer) for _ in range(300)] + [
        random_.randrange(footer, len(good)) for _ in range(300)
    ]
    refused = 0
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << random_.randrange(8)
        file.write_bytes(damaged)
        found = read(file)
        assert found in (None, expected), place
        refused += found is None
    assert refused > 300
    file.write_bytes(good)
    assert read(file) == expected


def test_many_flipped_bytes_at_once(tmp_path: Path) -> None:
    good = parquet("snappy")
    expected = [column.to_pylist() for column in table().columns]
    file = tmp_path / "a.parquet"
    random_ = random.Random(0)
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(random_.randrange(2, 40)):
            damaged[random_.randrange(len(good))] = random_.randrange(256)
        file.write_bytes(damaged)
        assert read(file) in (None, expected)


def refused(spec: CacheSpec, folder: Path, allowed: float = 0.0) -> list[Problem]:
    """What training would refuse, by the same ways: from files, or from rows. The check of all rows says the same."""
    try:
        found = list(judge_rows(open_or_build(spec, folder, 1), spec, allowed).problems)
    except ProblemsError as error:
        found = list(error.problems)
    try:
        checked = check_all(spec, allowed, workers=1).problems
    except ProblemsError as error:
        checked = list(error.problems)
    assert [problem.text() for problem in checked] == [problem.text() for problem in found]
    assert all(problem.code is ExitCode.DATA for problem in found)
    return found


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def in_text(content: bytes, row: int) -> int:
    """A place in the page that holds a row; rows whose number ends with 0 or 9 may be in a header's statistics too."""
    return content.index(table()["prompt"][row].as_py().encode())


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: parquet()[:-30], "the end mark of a parquet file is missing"),
    "truncated in the middle": (lambda: parquet()[:500], "the end mark of a parquet file is missing"),
    "empty": (lambda: b"", "is empty: 0 bytes"),
    "bad magic at the start": (lambda: b"PAR2" + parquet()[4:], "it begins with b'PAR2', expected b'PAR1'"),
    "bad magic at the end": (lambda: parquet()[:-4] + b"PARE", "the end mark of a parquet file is missing"),
    "zeros for a footer": (lambda: parquet()[:-200] + bytes(192) + parquet()[-8:], "cannot be read as parquet"),
    "only a footer": (lambda: b"PAR1" + parquet()[-900:], "cannot be read as parquet"),
    "0 rows": (lambda: _bytes(table().slice(0, 0)), "no rows at all"),
    "missing column": (lambda: _bytes(table().drop_columns("response")), "no column 'response'; found prompt"),
    "wrong type": (lambda: _bytes(pa.table({"prompt": [1], "response": ["r"]})), "prompt is int64, expected text"),
    "nested lists": (
        lambda: _bytes(pa.table({"prompt": [[["p"]]], "response": ["r"]})),
        "prompt is list<element: list<element: string>>, expected text",
    ),
    "all null": (lambda: _bytes(pa.table({"prompt": pa.nulls(1), "response": ["r"]})), "prompt is null, expected text"),
}


def _bytes(content: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(content, sink)
    return sink.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_beside_a_good_one(name: str, spec: MakeSpec, tmp_path: Path) -> None:
    content, message = FILES[name]
    good, bad = rows_file(tmp_path / "good.parquet", 3), tmp_path / "bad.parquet"
    bad.write_bytes(content())
    problems = refused(spec(bad), tmp_path / "cache", allowed=1.0)
    assert any(message in problem.rule and str(bad) in problem.text() for problem in problems)
    if name == "0 rows":  # not a fault beside other files
        assert refused(spec(good, bad), tmp_path / "cache") == []
        return
    (problem,) = refused(spec(good, bad), tmp_path / "cache", allowed=1.0)
    assert str(bad) in problem.text()
    assert str(good) not in problem.text()
    assert "the other 1 file is good" in problem.rule


def test_schemas_that_differ_over_the_files(spec: MakeSpec, tmp_path: Path) -> None:
    text = ["p", "q"]
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    good = [
        write(tmp_path / f"{number}.parquet", prompt=pa.array(text).cast(kind), response=text)
        for number, kind in enumerate(kinds)
    ]
    assert refused(spec(*good), tmp_path / "cache") == []
    number = write(tmp_path / "number.parquet", prompt=[1.5], response=["r"])
    renamed = write(tmp_path / "renamed.parquet", Prompt=["p"], response=["r"])
    problems = refused(spec(good[0], number, *good[1:], renamed), tmp_path / "cache")
    assert [str(number) in problem.rule for problem in problems] == [True, False]
    assert "prompt is double, expected text" in problems[0].rule
    assert f"in {renamed}\n" in problems[1].rule
    assert "did you mean 'Prompt'?" in problems[1].fix
    assert all("the other 4 files are good" in problem.rule for problem in problems)


def test_a_row_group_with_a_flipped_bit(spec: MakeSpec, tmp_path: Path) -> None:
    content = parquet(dictionary=False)
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    good.write_bytes(content)
    bad.write_bytes(flipped(content, in_text(content, 31)))
    subject = spec(good, bad)
    (problem,) = refused(subject, tmp_path / "cache")
    assert f"rows cannot be read; the first ones (rows count from 0):\n      {bad} row group 1: " in problem.rule
    assert "CRC checksum verification failed" in problem.rule
    cache = open_or_build(subject, tmp_path / "cache", 1)
    lost = cache.report["rejected"]["damaged"]
    assert cache.report["files"][0]["rows_usable"] == ROWS
    assert cache.report["files"][1]["rows_usable"] == ROWS - lost
    # The pages before the damaged one are good by their own checksums; other row groups are not touched.
    assert 0 < lost <= 20
    rejected = pq.read_table(cache.rejected).to_pylist()
    assert [row["row"] for row in rejected] == list(range(40 - lost, 40))
    assert {row["file"] for row in rejected} == {1}
    assert refused(subject, tmp_path / "cache", allowed=0.2) == []


def test_a_sample_names_the_row_group(spec: MakeSpec, tmp_path: Path) -> None:
    content = parquet(dictionary=False)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(flipped(content, in_text(content, 41)))
    looked = check_sample(spec(bad), 30)
    assert looked.counts.rows_read == 30
    assert "(in a sample) 10 of 30 rows cannot be read" in looked.problems[0].rule
    assert f"{bad} row group 2: " in looked.problems[0].rule


def test_a_page_that_is_passed_over_is_missed(tmp_path: Path, spec: MakeSpec) -> None:
    """A page whose header says that it is of another kind: pyarrow reads on without an error, and without its rows."""
    content = bytearray(parquet(dictionary=False))
    start = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(2).column(0).data_page_offset
    assert content[start : start + 2] == b"\x15\x00"  # field 1, a number: DATA_PAGE
    content[start + 1] = 2  # INDEX_PAGE
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    (problem,) = refused(spec(file), tmp_path / "cache")
    assert f"{file} row group 2: " in problem.rule


def test_a_footer_that_counts_fewer_rows(tmp_path: Path, spec: MakeSpec) -> None:
    """One bit in the footer, and pyarrow reads a row group's first rows without an error."""
    content = parquet()
    file, metadata = tmp_path / "a.parquet", pq.ParquetFile(pa.BufferReader(content)).metadata
    rules: set[str] = set()
    for place in range(len(content) - 8 - metadata.serialized_size, len(content) - 8):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            try:
                rows = pq.ParquetFile(pa.BufferReader(bytes(damaged))).metadata.num_rows
            except (OSError, ValueError, pa.ArrowException):
                continue
            if rows != ROWS:
                file.write_bytes(damaged)
                assert read(file) is None
                rules |= {problem.rule for problem in footer_problems([file], read_footers([file], COLUMNS, "k"), "k")}
    assert any("the footer counts" in rule and "its row groups 60" in rule for rule in rules)


def test_a_footer_is_decoded_as_pyarrow_does(tmp_path: Path) -> None:
    rows = [{"text": f"row {row}", "parts": ["a"] * (row % 3), "deep": {"er": row or None}} for row in range(50)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=20, compression="zstd")
    metadata, groups = pq.read_metadata(file), read_groups(file)
    assert [group.num_rows for group in groups] == [20, 20, 10]
    assert footer_fault(metadata, groups, file.stat().st_size) is None
    for number, group in enumerate(groups):
        for index, chunk in enumerate(group.chunks):
            other = metadata.row_group(number).column(index)
            assert ".".join(chunk.path) == other.path_in_schema
            assert (chunk.num_values, chunk.text_bytes) == (other.num_values, other.total_uncompressed_size)
            assert chunk.start == (other.dictionary_page_offset or other.data_page_offset)
            assert chunk.end - chunk.start == other.total_compressed_size


def test_what_does_not_fit_together_in_a_footer(tmp_path: Path) -> None:
    """Such a bit makes a column's cells those of another, each page with a good checksum."""
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet())
    metadata, groups, size = pq.read_metadata(file), read_groups(file), file.stat().st_size

    def fault(**changes: object) -> str | None:
        first, *others = groups[1].chunks
        changed = replace(groups[1], chunks=(replace(first, **changes), *others))
        return footer_fault(metadata, (groups[0], changed, groups[2]), size)

    assert fault() is None
    other = groups[2].chunks[0]
    assert "for two columns" in str(fault(start=other.start, end=other.end))
    assert "outside of the file" in str(fault(start=size, end=size + 10))
    assert "outside of the file" in str(fault(start=-1))
    assert "its column prompt 19" in str(fault(num_values=19))
    assert "other columns than the schema" in str(fault(path=("Prompt",)))
    assert "its row groups 40" in str(footer_fault(metadata, groups[:2], size))


def test_cells_that_cannot_be_used_are_named_by_row(spec: MakeSpec, tmp_path: Path) -> None:
    lone = "\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert lone == "\ufffd"  # a surrogate that was replaced before it was written is text like any other
    raw = pa.array([b"fine", b"\xed\xa0\x80", b"\xff\xfe", lone.encode(), None, b"huge", b"", b"nul \0"]).view(
        pa.string()
    )
    responses = ["r", "r", "r", "r", "r", "x" * (50 << 20), "", "r"]
    good, bad = rows_file(tmp_path / "good.parquet", 3), write(tmp_path / "bad.parquet", prompt=raw, response=responses)
    no_text, undecodable, empty, overlong = refused(spec(good, bad), tmp_path / "cache")
    assert f"{bad} row 4: prompt is null" in no_text.rule
    assert [f"{bad} row {row}: not valid UTF-8 at byte 0" in undecodable.rule for row in (1, 2)] == [True, True]
    assert f"{bad} row 6: " in empty.rule
    assert f"{bad} row 5: 52,428,804 characters, more than any 1,000 tokens" in overlong.rule
    assert str(good) not in "".join(problem.rule for problem in (no_text, undecodable, empty, overlong))
    cache = open_or_build(spec(good, bad), tmp_path / "cache", 1)
    assert [cache.origin(index) for index in range(3, 6)] == [(bad, 0), (bad, 3), (bad, 7)]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_files_without_checksums_are_told_from_others(
    version: str, compression: str, dictionary: bool, tmp_path: Path
) -> None:
    file = tmp_path / "a.parquet"
    for checksums in (True, False):
        file.write_bytes(parquet(compression, dictionary, checksums, data_page_version=version))
        assert has_checksums(file, ["prompt", "response"]) is checksums


def test_the_report_names_files_without_checksums(spec: MakeSpec, tmp_path: Path) -> None:
    bare = [rows_file(tmp_path / f"{number}.parquet", 2, seed=number) for number in range(12)]
    with_sums = tmp_path / "sums.parquet"
    with_sums.write_bytes(parquet())
    report = open_or_build(spec(*bare[:6], with_sums, *bare[6:]), tmp_path / "cache", 1).report
    assert report["files_without_checksums"] == {"count": 12, "first": [str(file) for file in bare[:10]]}
    assert [file["checksums"] for file in report["files"]] == [False] * 6 + [True] + [False] * 6


def test_a_file_without_checksums_that_changed_is_refused_on_resume(spec: MakeSpec, tmp_path: Path) -> None:
    """Nothing in the file shows the flipped bit; its content hash, which the checkpoint keeps, does."""
    content = parquet(dictionary=False, checksums=False)
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    config = JobConfig()
    begun = dict.fromkeys(("step", "total_steps", "steps_per_epoch", "epoch", "rows_done", "tokens"), 0)
    state = RunState(
        **begun,  # type: ignore[arg-type]
        supervised_tokens=0,
        loss=None,
        world=1,
        ulysses=1,
        data=open_or_build(spec(file), tmp_path / "cache", 1).fingerprint,
        model="",
        config=flat_config(config),
        kept=True,
        version="",
    )
    start = Start(tmp_path / "global_step_1", state)
    refuse_other_data(start, open_or_build(spec(file), tmp_path / "cache", 1).fingerprint, config)
    file.write_bytes(flipped(content, in_text(content, 31)))
    changed = open_or_build(spec(file), tmp_path / "cache", 1)
    assert refused(spec(file), tmp_path / "cache") == []
    with pytest.raises(ProblemsError, match="the content of the training files"):
        refuse_other_data(start, changed.fingerprint, config)
