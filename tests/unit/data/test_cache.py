from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.contract import ExitCode
from sft_job.data import cache as cache_module
from sft_job.data.cache import CacheSpec, DamagedCacheError, TokenCache, open_cache, open_or_build
from sft_job.data.columns import Column
from sft_job.data.judge import judge_rows
from sft_job.data.render import PromptResponseRenderer, load_tokenizer, truncate
from sft_job.errors import JobError, ProblemsError
from tests.unit.data.conftest import rows_file, words, write

MakeSpec = Callable[..., CacheSpec]


def content(cache: TokenCache) -> list[tuple[list[int], list[bool], tuple[Path, int]]]:
    rows = [cache.row(index) for index in range(len(cache))]
    return [(row.ids.tolist(), row.trained.tolist(), cache.origin(index)) for index, row in enumerate(rows)]


def folders(path: Path) -> list[str]:
    """What is left in a cache folder, apart from lock files."""
    return sorted(entry.name for entry in path.iterdir() if not entry.name.endswith(".lock"))


def test_rows_are_what_the_renderer_gives(spec: MakeSpec, tmp_path: Path) -> None:
    files = [rows_file(tmp_path / "a.parquet", 30), rows_file(tmp_path / "b.parquet", 20, seed=1)]
    subject = spec(*files, max_length=60, truncation="right")
    cache = open_or_build(subject, tmp_path / "cache", workers=1)
    renderer = PromptResponseRenderer(load_tokenizer(subject.tokenizer))
    expected = []
    for file in files:
        table = pq.read_table(file).to_pydict()
        for number, row in enumerate(renderer.render(table["prompt"], table["response"])):
            cut = truncate(row, 60, "right")
            trained = [any(start <= place < end for start, end in cut.spans) for place in range(len(cut.ids))]
            if cut.num_targets:
                expected.append((cut.ids, trained, (file, number)))
    assert content(cache) == expected
    assert cache.lengths.tolist() == [len(ids) for ids, _, _ in expected]
    assert cache.targets.tolist() == [sum(trained[1:]) for _, trained, _ in expected]
    assert (cache.lengths.dtype, cache.targets.dtype, cache.row(0).ids.dtype) == (np.int32, np.int32, np.int32)
    assert not cache.row(0).ids.flags.writeable
    with pytest.raises(IndexError):
        cache.row(len(cache))
    assert content(open_cache(cache.folder)) == expected


def test_the_report_adds_up(spec: MakeSpec, tmp_path: Path) -> None:
    files = [rows_file(tmp_path / "a.parquet", 40), rows_file(tmp_path / "b.parquet", 20, seed=1)]
    cache = open_or_build(spec(*files, max_length=40, truncation="right"), tmp_path / "cache", workers=1)
    report = cache.report
    assert report["rows_read"] == 60
    assert report["rows_usable"] == cache.num_rows == 60 - report["rows_without_target"]
    assert report["rows_without_target"] > 3
    assert report["rows_truncated"] > report["rows_without_target"]
    assert report["tokens"] == cache.lengths.sum()
    assert report["trained_tokens"] == cache.targets.sum()
    assert report["longest_row"] > 40
    assert [file["path"] for file in report["files"]] == [str(file) for file in files]
    for name in ("rows_read", "rows_usable", "rows_without_target", "rows_truncated", "tokens", "trained_tokens"):
        assert report[name] == sum(file[name] for file in report["files"])
    assert any("a response ends with '<|im_end|>'" in note for note in report["notes"])
    assert any("rows" in warning and "are set aside" in warning for warning in report["warnings"])


def test_few_rows_set_aside_are_no_warning(spec: MakeSpec, tmp_path: Path) -> None:
    prompts = ["short"] * 19 + ["long " * 100]
    for count, warned in ((20, False), (19, True)):
        file = write(tmp_path / f"{count}.parquet", prompt=prompts[-count:], response=["yes"] * count)
        report = open_or_build(spec(file, max_length=80, truncation="right"), tmp_path / "cache", 1).report
        assert report["rows_without_target"] == 1
        assert bool(report["warnings"]) is warned


def test_a_file_listed_twice_counts_twice_with_a_warning(spec: MakeSpec, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.parquet", 5)
    cache = open_or_build(spec(file, file), tmp_path / "cache", 1)
    assert cache.num_rows == 10
    assert "is listed more than once" in cache.report["warnings"][0]


def test_empty_prompts_and_responses_are_rows(spec: MakeSpec, tmp_path: Path) -> None:
    """An empty response trains the end of the turn; a row without any text is rejected."""
    file = write(tmp_path / "a.parquet", prompt=["", "p", ""], response=["r", "", ""])
    cache = open_or_build(spec(file), tmp_path / "cache", 1)
    assert cache.targets.tolist()[1:] == [1]
    assert cache.row(1).ids[-1] == 2
    assert "1 of 3 rows of data.train_files train one token" in cache.report["notes"][-1]
    (problem,) = judge_rows(cache, spec(file), 0.0).problems
    assert f"1 of 3 rows are empty: neither prompt nor response has a character:\n      {file} row 2:" in problem.rule


def test_structs_and_several_columns(spec: MakeSpec, tmp_path: Path) -> None:
    extra = [[{"question": f"q{row}", "answer": f"a{row}"}] for row in range(5)]
    nested = write(tmp_path / "nested.parquet", extra=extra, unused=[1] * 5)
    flat = write(tmp_path / "flat.parquet", prompt=[f"q{row}" for row in range(5)], response=["a0\na0"] + ["x"] * 4)
    columns = {
        "prompt": (Column("data.prompt_key", "extra", ("question",)),),
        "response": (Column("data.response_key", "extra", ("answer",)),) * 2,
    }
    first = open_or_build(spec(nested, **columns), tmp_path / "cache", 1)
    second = open_or_build(spec(flat), tmp_path / "cache", 1)
    assert first.row(0).ids.tolist() == second.row(0).ids.tolist()
    assert first.num_rows == 5


def test_max_samples_takes_the_first_rows_over_the_files(spec: MakeSpec, tmp_path: Path) -> None:
    files = [rows_file(tmp_path / f"{name}.parquet", 6, seed=name) for name in range(3)]
    whole = content(open_or_build(spec(*files), tmp_path / "cache", 1))
    for count in (1, 6, 8, 18, 99):
        cache = open_or_build(spec(*files, max_samples=count), tmp_path / "cache", 1)
        assert content(cache) == whole[:count]
    with pytest.raises(ProblemsError, match=r"data.train_max_samples = 0\n.*leaves no row"):
        open_or_build(spec(*files, max_samples=0), tmp_path / "cache", 1)


def refused(subject: CacheSpec, folder: Path, workers: int = 1) -> ProblemsError:
    """The error for the rows; the cache is there all the same."""
    cache = open_or_build(subject, folder, workers)
    assert folders(folder) == [cache.folder.name]
    return ProblemsError(judge_rows(cache, subject, 0.0).problems)


def test_overlong_rows_are_counted_and_the_first_ten_shown(spec: MakeSpec, tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", prompt=["p"], response=["r"])
    prompts = ["x y z " * 50 if row % 2 else "fine" for row in range(40)]
    bad = write(tmp_path / "bad.parquet", prompt=prompts, response=["r"] * 40)
    error = refused(spec(good, bad, max_length=100), tmp_path / "cache")
    assert error.code is ExitCode.DATA
    (problem,) = error.problems
    assert problem.subject == "data.max_length"
    assert "20 of 41 rows are longer than 100 tokens and data.truncation is error" in problem.rule
    lines = problem.rule.splitlines()[1:]
    assert [line.split(": ")[0].split() for line in lines] == [[str(bad), "row", str(row)] for row in range(1, 21, 2)]
    assert all(line.endswith(" tokens") for line in lines)


def test_cells_without_text_are_counted_by_row(spec: MakeSpec, tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xed\xa0\x80", b"c", b"d"]).view(pa.string())
    file = write(tmp_path / "a.parquet", prompt=raw, response=["r", "r", None, "r"])
    null, undecodable = refused(spec(file), tmp_path / "cache").problems
    assert null.rule == f"1 of 4 rows have no text to train on:\n      {file} row 2: response is null"
    assert f"1 of 4 rows hold bytes that are not valid UTF-8:\n      {file} row 1: not valid UTF-8" in undecodable.rule


def test_rows_that_the_template_refuses(spec: MakeSpec, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no bad') }}{% endif %}{% endfor %}"
    )
    file = write(tmp_path / "a.parquet", prompt=["good", "bad", "good"], response=["r"] * 3)
    (problem,) = refused(spec(file, chat_template=template), tmp_path / "cache").problems
    assert f"1 of 3 rows make the chat template fail:\n      {file} row 1: TemplateError: no bad" in problem.rule


def test_no_row_with_a_target_at_all(spec: MakeSpec, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", prompt=["long " * 100] * 3, response=["r"] * 3)
    error = refused(spec(file, max_length=20, truncation="right"), tmp_path / "cache")
    assert error.code is ExitCode.DATA
    assert "none of 3 rows has a token to train on within data.max_length = 20" in str(error)
    assert open_or_build(spec(file, max_length=20, truncation="left"), tmp_path / "cache", 1).num_rows == 3


def test_flipped_bytes_in_a_page_are_found_and_named(spec: MakeSpec, tmp_path: Path) -> None:
    texts = [f"{row} " + words(random.Random(row), 30) for row in range(300)]
    good = write(tmp_path / "good.parquet", prompt=texts, response=texts)
    bad = tmp_path / "bad.parquet"
    options: dict[str, Any] = {"row_group_size": 100, "write_page_checksum": True, "compression": "none"}
    pq.write_table(pa.table({"prompt": texts, "response": texts}), bad, use_dictionary=False, **options)
    broken = bytearray(bad.read_bytes())
    place = broken.find(texts[150].encode())
    broken[place] ^= 1
    bad.write_bytes(broken)
    (problem,) = refused(spec(good, bad), tmp_path / "cache").problems
    assert problem.code is ExitCode.DATA
    assert (
        f"100 of 600 rows cannot be read; the first ones (rows count from 0):\n      {bad} row group 1: "
        in problem.rule
    )


def test_footers_are_checked_before_any_row(spec: MakeSpec, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", Prompt=["a"], response=["b"])
    with pytest.raises(ProblemsError, match="no column 'prompt'"):
        open_or_build(spec(file), tmp_path / "cache", 1)
    assert folders(tmp_path / "cache") == []


def test_equal_content_is_one_cache_with_todays_paths(spec: MakeSpec, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.parquet", 5)
    first = open_or_build(spec(file), tmp_path / "cache", 1)
    moved = file.rename(tmp_path / "moved.parquet")
    os.utime(moved, (1, 1))
    second = open_or_build(spec(moved), tmp_path / "cache", 1)
    assert second.folder == first.folder
    assert second.origin(3) == (moved, 3)
    assert second.report["files"][0]["path"] == str(moved)


def test_content_that_changed_under_the_same_size_and_time_is_noticed(spec: MakeSpec, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", prompt=["graph"], response=["one"])
    before = file.stat()
    first = open_or_build(spec(file), tmp_path / "cache", 1)
    write(file, prompt=["graph"], response=["two"])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = open_or_build(spec(file), tmp_path / "cache", 1)
    assert content(second) != content(first)


def test_every_option_has_a_cache_of_its_own(spec: MakeSpec, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.parquet", 3)
    other = rows_file(tmp_path / "b.parquet", 3, seed=9)
    variants: list[CacheSpec] = [
        spec(file),
        spec(other),
        spec(file, other),
        spec(other, file),
        spec(file, split="val"),
        spec(file, max_samples=2),
        spec(file, max_length=999),
        spec(file, truncation="left"),
        spec(file, chat_template="{{ messages[0].content }}"),
        spec(file, template_kwargs={"no_think": True}),
        spec(file, response=(Column("data.response_key", "prompt"),)),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    before = variants[0].fingerprint()
    tokenizer = variants[0].tokenizer / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert variants[0].fingerprint() != before


def test_other_library_versions_tokenise_again(spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = rows_file(tmp_path / "a.parquet", 3)
    first = open_or_build(spec(file), tmp_path / "cache", 1)
    monkeypatch.setattr(cache_module, "library_versions", lambda: {"tokenizers": "99"})
    second = open_or_build(spec(file), tmp_path / "cache", 1)
    assert second.folder != first.folder
    assert second.fingerprint == first.fingerprint


def damages(folder: Path) -> Iterator[Callable[[], object]]:
    part, lengths, manifest = folder / "part-000000.arrow", folder / "lengths.int32", folder / "manifest.json"
    text = manifest.read_text()
    size = part.stat().st_size
    yield part.unlink
    yield lambda: os.truncate(part, size - 8)
    yield lambda: part.write_bytes(bytes(size))
    yield lambda: lengths.write_bytes(b"")
    yield lambda: lengths.write_bytes(lengths.read_bytes() + bytes(4))
    yield manifest.unlink
    yield lambda: manifest.write_text(text[:100])
    yield lambda: manifest.write_text(json.dumps({**json.loads(text), "format": 0}))
    yield lambda: manifest.write_text(json.dumps({**json.loads(text), "rows": 3}))
    yield lambda: manifest.write_text("[]")


def test_a_damaged_cache_is_built_again(spec: MakeSpec, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.parquet", 20)
    cache = open_or_build(spec(file), tmp_path / "cache", 1)
    expected = content(cache)
    for damage in damages(cache.folder):
        damage()
        with pytest.raises(DamagedCacheError):
            open_cache(cache.folder)
        again = open_or_build(spec(file), tmp_path / "cache", 1)
        assert again.folder == cache.folder
        assert content(again) == expected
    assert folders(tmp_path / "cache") == [cache.folder.name]


def test_a_whole_cache_is_not_built_again(spec: MakeSpec, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.parquet", 20)
    calls: list[tuple[int, int]] = []
    for _ in range(2):
        open_or_build(spec(file), tmp_path / "cache", 1, lambda done, total: calls.append((done, total)))
    assert calls == [(20, 20)]


def test_what_a_killed_builder_left_is_cleared_away(spec: MakeSpec, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.parquet", 5)
    name = open_or_build(spec(file), tmp_path / "cache", 1).folder.name
    (tmp_path / "cache" / name).rename(tmp_path / "cache" / f".{name}.old-dead")
    open_or_build(spec(file), tmp_path / "cache", 1)
    assert folders(tmp_path / "cache") == [name]


def test_an_exception_from_progress_ends_the_building(spec: MakeSpec, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    file = rows_file(tmp_path / "a.parquet", 5)
    with pytest.raises(KeyboardInterrupt):
        open_or_build(spec(file), tmp_path / "cache", 1, stop)
    assert folders(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_made(spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(ProblemsError, match="the token cache cannot be written") as raised:
        open_or_build(spec(rows_file(tmp_path / "a.parquet", 2)), tmp_path / "cache" / "sub", 1)
    assert raised.value.code is ExitCode.CANNOT_CREATE


def test_parts_beyond_the_bound_are_unmapped_and_no_file_stays_open(
    spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_job.data.pieces.piece_bytes", lambda total: 2000)
    monkeypatch.setattr(cache_module, "_MAPPED_BYTES", 20_000)
    cache = open_or_build(spec(rows_file(tmp_path / "a.parquet", 200)), tmp_path / "cache", 1)
    parts = len(list(cache.folder.glob("part-*.arrow")))
    assert parts > 8

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f"{cache.folder}/part-")

    open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    kept = cache.row(0)
    before = kept.ids.tolist()
    for index in range(len(cache)):
        cache.row(index)
    assert 0 < mapped() < parts
    assert len(os.listdir("/proc/self/fd")) == open_files  # noqa: PTH208
    assert kept.ids.tolist() == before


def test_threads_may_read_together(spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_job.data.pieces.piece_bytes", lambda total: 2000)
    monkeypatch.setattr(cache_module, "_MAPPED_BYTES", 10_000)
    cache = open_or_build(spec(rows_file(tmp_path / "a.parquet", 100)), tmp_path / "cache", 1)
    expected = content(cache)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for index in np.random.default_rng(seed).permutation(100):
            wrong.extend([] if cache.row(int(index)).ids.tolist() == expected[index][0] else [int(index)])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """3 MB of text in one large row group and many small files: enough for several processes."""
    folder = tmp_path_factory.mktemp("large")
    random_ = random.Random(0)
    texts = [f"{row} " + " ".join(f"{random_.randrange(1 << 40):x}" for _ in range(40)) for row in range(6000)]
    first = write(folder / "0.parquet", prompt=texts[:4000], response=["yes"] * 4000)
    small = [
        write(folder / f"{n}.parquet", prompt=pa.array(texts[n : n + 100], pa.large_string()), response=["no"] * 100)
        for n in range(4000, 6000, 100)
    ]
    return [first, *small]


def test_the_cache_is_the_same_for_any_number_of_workers(
    large: list[Path], spec: MakeSpec, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    caches = [open_or_build(spec(*large), tmp_path / str(workers), workers) for workers in (1, 3)]
    trees = [{path.name: path.read_bytes() for path in cache.folder.iterdir()} for cache in caches]
    assert len([name for name in trees[0] if name.startswith("part-")]) >= 2
    assert trees[0] == trees[1]
    assert caches[1].num_rows == 6000
    assert capfd.readouterr().err == ""
    assert multiprocessing.active_children() == []


def test_faults_are_counted_exactly_over_several_workers(large: list[Path], spec: MakeSpec, tmp_path: Path) -> None:
    subject = spec(*large, max_length=50)
    (problem,) = refused(subject, tmp_path / "cache", 2).problems
    listed = pq.read_table(open_or_build(subject, tmp_path / "cache", 2).rejected).to_pydict()
    assert listed["row"] == [*range(4000), *range(100)] + [*range(100)] * 19
    assert listed["file"] == sorted(listed["file"])
    assert set(listed["kind"]) == {"overlong"}
    assert "6,000 of 6,000 rows are longer than 50 tokens" in problem.rule
    assert [line.split(": ")[0].rsplit(" ", 1)[1] for line in problem.rule.splitlines()[1:]] == [*map(str, range(10))]


def test_a_killed_worker_is_a_lost_process(large: list[Path], spec: MakeSpec, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(JobError, match=r"ended with -9 while it was tokenising") as raised:
        open_or_build(spec(*large, *large), tmp_path / "cache", 2, kill)
    assert raised.value.code is ExitCode.LOST
    assert folders(tmp_path / "cache") == []
    assert multiprocessing.active_children() == []


def _build(subject: CacheSpec, folder: Path, start: Any, answers: Any) -> None:
    start.wait()
    calls: list[tuple[int, int]] = []
    cache = open_or_build(subject, folder, 1, lambda done, total: calls.append((done, total)))
    answers.put((cache.folder.name, cache.num_rows, any(total for _, total in calls)))


def test_two_processes_at_once_build_once(large: list[Path], spec: MakeSpec, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    start, answers = context.Barrier(2), context.Queue()
    arguments = (spec(*large), tmp_path / "cache", start, answers)
    processes = [context.Process(target=_build, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    names, rows, built = zip(*[answers.get(timeout=60) for _ in processes], strict=True)
    for process in processes:
        process.join()
    assert len(set(names)) == 1
    assert rows == (6000, 6000)
    assert sorted(built) == [False, True]
    assert folders(tmp_path / "cache") == [names[0]]


def test_without_locks_the_first_to_finish_wins(
    spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> bool:
        raise NotImplementedError

    monkeypatch.setattr(cache_module, "_acquire", no_locks)
    subject = spec(rows_file(tmp_path / "a.parquet", 5))
    folder = tmp_path / "cache"
    first: list[TokenCache] = []

    def other_builder(done: int, total: int) -> None:
        first.append(open_or_build(subject, folder, 1))

    second = open_or_build(subject, folder, 1, other_builder)
    assert content(second) == content(first[0])
    assert folders(folder) == [second.folder.name]
