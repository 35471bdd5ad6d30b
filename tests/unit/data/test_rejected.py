"""Rows that are not trained on: listed one by one, counted without a remainder, judged by their share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode, RunFolder
from sft_job.data.cache import CacheSpec, TokenCache, open_cache, open_or_build
from sft_job.data.faults import Fault, FaultLog
from sft_job.data.fit import Turns
from sft_job.data.judge import judge, judge_rows
from sft_job.data.prepare import prepare
from sft_job.data.rejected import LOGGED, LeftOut
from sft_job.data.render import Rendered
from sft_job.data.sample import check_all, check_sample
from sft_job.data.tokenise import Made, PieceTokeniser
from sft_job.errors import ProblemsError
from tests.unit.data.conftest import rows_file, write

MakeSpec = Callable[..., CacheSpec]
REFUSES = (
    "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no bad') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
CELLS = st.one_of(st.none(), st.binary(max_size=4), st.text("abc ", max_size=40).map(str.encode), st.just(b"bad"))
FATES = ("rows_usable", "rows_rejected", "rows_without_target", "rows_dropped")


def table_of(cells: list[tuple[bytes | None, bytes | None]]) -> dict[str, Any]:
    columns = zip(*cells, strict=True) if cells else ([], [])
    names = ("prompt", "response")
    return {name: pa.array(column, pa.binary()).view(pa.string()) for name, column in zip(names, columns, strict=True)}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tables=st.lists(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8), min_size=1, max_size=3),
    how=st.sampled_from(["error", "left", "right", "drop", "turn"]),
    limit=st.integers(2, 30),
    most=st.sampled_from([-1, 1, 5]),
)
def test_every_row_that_is_read_has_one_fate(
    tables: list[Any], how: str, limit: int, most: int, spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    files = [write(folder / f"{number}.parquet", **table_of(cells)) for number, cells in enumerate(tables)]
    subject = spec(*files, truncation=how, max_length=limit, max_samples=most, chat_template=REFUSES)
    cache = open_or_build(subject, folder / "cache", 1)
    report, listed = cache.report, pq.read_table(cache.rejected).to_pylist()
    read = sum(map(len, tables)) if most < 0 else min(most, sum(map(len, tables)))
    assert report["rows_read"] == read
    for counts in (report, *report["files"]):
        assert counts["rows_read"] == sum(counts[fate] for fate in FATES)
        assert counts["rows_rejected"] == sum(counts["rejected"].values())
        assert len(counts["lengths"]["counts"]) == len(counts["lengths"]["edges"]) - 1
        assert counts["lengths"]["edges"][-1] > counts["longest_row"]
    for name in (*FATES, "rows_truncated", "tokens", "trained_tokens", "duplicates"):
        assert report[name] == sum(file[name] for file in report["files"])
    rendered = report["rows_usable"] + report["rows_without_target"] + report["rows_dropped"]
    assert sum(report["lengths"]["counts"]) == rendered + report["rejected"].get("overlong", 0)
    # Each row that is read is either in the cache or in the list.
    used = [cache.origin(index) for index in range(len(cache))]
    places = used + [(files[row["file"]], row["row"]) for row in listed]
    everything = [(file, row) for file, cells in zip(files, tables, strict=True) for row in range(len(cells))]
    assert sorted(places) == sorted(everything[:read])
    kinds = Counter(row["kind"] for row in listed)
    assert kinds == {fault.value: count for fault, count in cache.faults.counts.items()}
    assert kinds.pop("without_target", 0) == report["rows_without_target"]
    assert kinds.pop("dropped", 0) == report["rows_dropped"]
    assert kinds == report["rejected"]
    if how in ("left", "right"):
        assert not report["rows_dropped"]
    if how != "error":
        assert "overlong" not in report["rejected"]
    assert check_all(subject, 1.0, workers=1).counts.report() == {
        **{name: report[name] for name in check_all(subject, 1.0, workers=1).counts.report()},
        "duplicates": 0,
    }


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """10 rows: two without text, one overlong at 60 tokens, one without any character."""
    prompts: list[str | None] = ["p", None, "p", "word " * 60, "", "p", "p", "p", "p", "p"]
    return write(tmp_path / "mixed.parquet", prompt=prompts, response=["r", "r", None, "r", "", *"rrrrr"])


def test_the_fraction_decides_and_needs_no_new_tokenising(mixed: Path, spec: MakeSpec, tmp_path: Path) -> None:
    subject = spec(mixed, max_length=60)
    cache = open_or_build(subject, tmp_path / "cache", 1)
    assert cache.report["rejected"] == {"no_text": 2, "empty": 1, "overlong": 1}
    listing = tmp_path / "list.parquet"
    for allowed in (0.0, 0.39):
        problems = judge_rows(cache, subject, allowed, listing).problems
        assert [problem.subject for problem in problems] == ["data.train_files", "data.train_files", "data.max_length"]
        assert all(problem.code is ExitCode.DATA for problem in problems)
        assert all(f"all of them: {listing}" in problem.rule for problem in problems)
        assert all(f"is {allowed:g}: with 0.4 the run goes on" in problem.fix for problem in problems)
    for allowed in (0.4, 1.0):
        judged = judge_rows(cache, subject, allowed, listing)
        assert judged.problems == ()
        assert "4 of 10 rows of data.train_files (40 %) cannot be used and are left out" in judged.warning
        assert "(2 no_text, 1 empty, 1 overlong)" in judged.warning
        assert str(listing) in judged.warning
    looked = [check_sample(subject, 10, 0.3), check_all(subject, 0.3, 1), check_sample(subject, 10, 0.4)]
    assert [len(each.problems) for each in looked] == [3, 3, 0]
    assert looked[2].warning.startswith("(in a sample) 4 of 10 rows")


def test_the_shown_share_is_enough() -> None:
    for rejected, rows in ((1, 3), (2, 3), (1, 7), (1, 100_003), (99_999, 100_000)):
        log = FaultLog()
        log.add(Fault.NO_TEXT, 0, "row 1", "null", rejected)

        def problems(allowed: float, log: FaultLog = log, rows: int = rows) -> tuple[Any, ...]:
            return judge(log, rows, files=[Path("a")], option="o", max_length=1, allowed=allowed).problems

        (problem,) = problems(0.0)
        assert problems(float(problem.fix.split("with ")[1].split()[0])) == ()


def test_rows_left_out_by_request_do_not_count(spec: MakeSpec, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", prompt=["p", "word " * 60, "word " * 60], response=["r"] * 3)
    for how, fate in (("drop", "rows_dropped"), ("turn", "rows_dropped"), ("right", "rows_without_target")):
        subject = spec(file, max_length=60, truncation=how)
        cache = open_or_build(subject, tmp_path / "cache", 1)
        assert (cache.num_rows, cache.report[fate], cache.report["rows_rejected"]) == (1, 2, 0)
        assert judge_rows(cache, subject, 0.0) == judge_rows(cache, subject, 1.0)
        assert judge_rows(cache, subject, 0.0).problems == ()
        kinds = {row["kind"] for row in pq.read_table(cache.rejected).to_pylist()}
        assert kinds == {"dropped" if fate == "rows_dropped" else "without_target"}
    reasons = pq.read_table(cache.rejected).column("reason").to_pylist()
    assert "tokens cut to 60 (right)" in reasons[0]


@pytest.mark.parametrize("how", ["error", "drop", "right"])
def test_nothing_usable_is_refused_whatever_is_allowed(how: str, spec: MakeSpec, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", prompt=["word " * 60] * 3, response=["r"] * 3)
    subject = spec(file, max_length=60, truncation=how)
    cache = open_or_build(subject, tmp_path / "cache", 1)
    assert len(cache) == 0
    assert len(open_cache(cache.folder)) == 0
    (problem,) = judge_rows(cache, subject, 1.0).problems
    assert "none of 3 rows has a token to train on" in problem.rule
    assert check_all(subject, 1.0, 1).problems == [problem]


def test_conversations_lose_their_oldest_turns(spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokeniser asks for the row again, without as many turns as it takes."""
    lengths = {0: [5, 5, 5], 1: [30, 10, 9], 2: [1, 1, 40]}

    def rows(self: PieceTokeniser, segment: Any, batch: Any, faults: LeftOut) -> Any:
        for number, turns in lengths.items():

            def render(count: int, turns: list[int] = turns) -> Rendered:
                ids = list(range(sum(turns[count:])))
                return Rendered(ids, ((len(ids) - 1, len(ids)),))

            yield Made(number, render(0), Turns(len(turns), render))

    monkeypatch.setattr(PieceTokeniser, "_rows", rows)
    file = rows_file(tmp_path / "a.parquet", 3)
    cache = open_or_build(spec(file, max_length=20, truncation="turn"), tmp_path / "cache", 1)
    assert cache.lengths.tolist() == [15, 19]
    assert (cache.report["rows_truncated"], cache.report["rows_dropped"], cache.report["longest_row"]) == (1, 1, 49)
    assert pq.read_table(cache.rejected).to_pylist() == [
        {"file": 0, "row": 2, "kind": "dropped", "reason": "42 tokens"}
    ]


def logged(run: RunFolder) -> list[dict[str, Any]]:
    table = pq.read_table(run.rejected_rows)
    assert table.schema.equals(LOGGED)
    return table.to_pylist()


@pytest.fixture
def config(model_folder: Path, mixed: Path, tmp_path: Path) -> JobConfig:
    config = JobConfig()
    config.model.partial_pretrain = str(model_folder)
    config.data.train_files = str(mixed)
    config.data.val_files = str(rows_file(tmp_path / "val.parquet", 5, seed=1))
    return config


def test_a_refused_run_leaves_the_list_and_the_report(config: JobConfig, mixed: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ProblemsError) as raised:
        prepare(config, run)
    assert raised.value.code is ExitCode.DATA
    assert str(run.rejected_rows) in str(raised.value)
    rows = logged(run)
    assert [(row["split"], row["name"], row["file"], row["row"], row["kind"]) for row in rows] == [
        ("train", "train", str(mixed), 1, "no_text"),
        ("train", "train", str(mixed), 2, "no_text"),
        ("train", "train", str(mixed), 4, "empty"),
    ]
    assert rows[1]["reason"] == "response is null"
    before = {path: path.stat().st_ino for path in run.cache.rglob("*")}
    config.data.max_rejected_fraction = 0.3
    warnings: list[str] = []
    train, _ = prepare(config, run, warn=warnings.append)
    assert train.num_rows == 7
    warnings = [warning for warning in warnings if "3 of 10 rows" in warning]
    assert len(warnings) == 1
    assert before == {path: path.stat().st_ino for path in run.cache.rglob("*")}
    report = json.loads(run.data_report.read_text())
    (of_train,), (of_val,) = report["train"], report["val"]
    assert of_train["warnings"] == warnings
    assert of_train["rejected"] == {"no_text": 2, "empty": 1}
    assert (of_val["rows_read"], of_val["rejected"]) == (5, {})


def test_the_list_is_written_when_it_is_empty(config: JobConfig, tmp_path: Path) -> None:
    config.data.train_files = str(rows_file(tmp_path / "good.parquet", 4))
    run = RunFolder(tmp_path / "run")
    prepare(config, run)
    assert logged(run) == []


def test_reasons_that_no_file_can_hold(tmp_path: Path) -> None:
    left_out = LeftOut()
    left_out.add(Fault.NOT_RENDERED, 0, 3, "lone \ud800 surrogate " + "x" * 1000)
    (row,) = left_out.table().to_pylist()
    assert row["reason"].startswith("lone ? surrogate")
    assert len(row["reason"]) == 300


def test_a_cache_without_its_list_is_built_again(mixed: Path, spec: MakeSpec, tmp_path: Path) -> None:
    cache = open_or_build(spec(mixed), tmp_path / "cache", 1)
    for name in ("rejected.parquet", "hashes.uint64"):
        (cache.folder / name).unlink()
        again = open_or_build(spec(mixed), tmp_path / "cache", 1)
        assert isinstance(again, TokenCache)
        assert (again.folder / name).exists()
    assert np.fromfile(cache.folder / "hashes.uint64", dtype=np.uint64).shape == (2 * cache.num_rows,)


def test_the_fraction_is_no_part_of_what_a_class_is_compared_by(tmp_path: Path) -> None:
    from sft_job.data.custom import custom_class

    (tmp_path / "rows.py").write_text("class Rows:\n    pass\n")
    config = JobConfig()
    config.data.custom_cls.path, config.data.custom_cls.name = str(tmp_path / "rows.py"), "Rows"
    prints = []
    for config.data.max_rejected_fraction in (0.0, 0.5):
        custom = custom_class(config.data)
        assert custom is not None
        prints.append(replace(custom).fingerprint())
    assert prints[0] == prints[1]
