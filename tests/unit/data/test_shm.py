from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from sft_job.config.schema import JobConfig
from sft_job.contract import RunFolder
from sft_job.data.cache import CacheSpec, open_or_build
from sft_job.data.prepare import prepare
from sft_job.data.shm import clean_stale, to_shm
from sft_job.errors import ProblemsError
from tests.unit.data.conftest import rows_file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of the same name."""
    paths = [tmp_path / name / "rows.parquet" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"content of {path.parent.name}")
    return paths


def fail(text: str) -> None:
    pytest.fail(f"warned: {text}")


def entries(root: Path) -> list[Path]:
    return [path for path in (root / f"sft_job-{os.getuid()}").iterdir() if path.is_dir()]


def test_copies_have_content_name_and_order(root: Path, files: list[Path]) -> None:
    copies = to_shm(files, root, fail)
    assert [path.read_text() for path in copies] == ["content of a", "content of b"]
    assert [path.name for path in copies] == ["rows.parquet"] * 2
    assert all(path.is_relative_to(root) for path in copies)
    assert (root / f"sft_job-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_a_folder_with_links_as_the_hub_makes_them(root: Path, tmp_path: Path) -> None:
    model = tmp_path / "models" / "base"
    (model / "nested").mkdir(parents=True)
    (model / ".git").mkdir()
    (model / ".git" / "big").write_text("hidden")
    (tmp_path / "blob").write_text("weights")
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    (model / "nested" / "config.json").write_text("{}")
    (copy,) = to_shm([model], root, fail)
    assert copy.name == "base"
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()) == [
        "model.safetensors",
        "nested/config.json",
    ]
    (tmp_path / "blob").unlink()
    assert (copy / "model.safetensors").read_text() == "weights"


def test_used_again_until_something_changes(root: Path, files: list[Path]) -> None:
    first = to_shm(files, root, fail)
    inode = first[0].stat().st_ino
    assert to_shm(files, root, fail) == first
    assert first[0].stat().st_ino == inode
    files[1].write_text("other")
    second = to_shm(files, root, fail)
    assert second[1].read_text() == "other"
    assert first[1].read_text() == "content of b"
    assert set(to_shm(files[::-1], root, fail)).isdisjoint(second)
    same = files[0].stat()
    files[0].write_text("CONTENT of a")  # as long as before
    os.utime(files[0], ns=(same.st_atime_ns, same.st_mtime_ns + 1))
    assert to_shm(files, root, fail)[0].read_text() == "CONTENT of a"


def test_what_does_not_fit_stays_where_it_is(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "copyfile", lambda *paths: pytest.fail("it is copied"))  # it would fill the disk
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 1 << 43)  # a hole of 8 TiB
    warnings: list[str] = []
    assert to_shm([huge], root, warnings.append) == [huge]
    assert len(warnings) == 1
    assert f"8192.00 GiB ({huge}) do not fit" in warnings[0]
    assert entries(root) == []


@pytest.mark.parametrize("trouble", ["no root", "no file", "another user's folder"])
def test_whatever_fails_is_a_warning(root: Path, files: list[Path], trouble: str) -> None:
    if trouble == "no root":
        root.rmdir()
    elif trouble == "no file":
        files[1].unlink()
    else:
        (root / f"sft_job-{os.getuid()}").symlink_to(files[0].parent)
    warnings: list[str] = []
    assert to_shm(files, root, warnings.append) == files
    assert len(warnings) == 1
    assert "use_shm: 2 files cannot be copied" in warnings[0]
    assert [path.name for path in files[0].parent.iterdir()] == ["rows.parquet"]


def _copy_and_wait(files: list[Path], root: Path, barrier: Callable[[], int], results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    copies = to_shm(files, root, fail)
    results.put((copies, [path.stat().st_ino for path in copies]))  # type: ignore[attr-defined]


def test_several_processes_make_one_copy(root: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(8 << 20))
    context = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_copy_and_wait, args=([big], root, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1] == found[2]
    assert found[0][0][0].read_bytes() == big.read_bytes()
    assert len(entries(root)) == 1


class TestStale:
    def test_only_what_nobody_asked_for(self, root: Path, files: list[Path]) -> None:
        old, new = to_shm(files[:1], root, fail)[0], to_shm(files[1:], root, fail)[0]
        past = time.time() - 7200
        for copy in (old, new):
            os.utime(copy.parents[1], (past, past))
        to_shm(files[1:], root, fail)  # asked for again
        with old.open() as stream:
            assert clean_stale(root, seconds=3600) == [old.parents[1]]
            assert stream.read() == "content of a"
        assert not old.exists()
        assert new.exists()
        assert to_shm(files[:1], root, fail)[0].read_text() == "content of a"

    def test_one_in_use_is_left_and_a_half_done_one_goes(self, root: Path, files: list[Path]) -> None:
        copy = to_shm(files, root, fail)[0]
        home, entry = copy.parents[2], copy.parents[1]
        os.utime(entry, (0, 0))
        for name in ("one", "two"):
            (home / f".copying-{name}").mkdir()
        with filelock.FileLock(home / f".{entry.name}.lock"), filelock.FileLock(home / ".one.lock"):
            assert clean_stale(root) == [home / ".copying-two"]
        assert sorted(clean_stale(root)) == sorted([home / ".copying-one", entry])

    def test_room_is_made_before_copying(self, root: Path, files: list[Path]) -> None:
        old = to_shm(files[:1], root, fail)[0].parents[1]
        os.utime(old, (0, 0))
        copy = to_shm(files[1:], root, fail)[0]
        assert entries(root) == [copy.parents[1]]

    def test_a_copy_that_was_killed_is_made_again(self, root: Path, files: list[Path]) -> None:
        entry = to_shm(files, root, fail)[0].parents[1]
        entry.rename(entry.with_name(f".copying-{entry.name}"))
        (entry.with_name(f".copying-{entry.name}") / "0" / "rows.parquet").write_text("hal")
        assert to_shm(files, root, fail)[0].read_text() == "content of a"
        assert entries(root) == [entry]


def test_data_use_shm_reads_the_copies_and_names_the_files(
    model_folder: Path, root: Path, tmp_path: Path, spec: Callable[..., CacheSpec]
) -> None:
    config = JobConfig()
    config.model.partial_pretrain = str(model_folder)
    config.data.train_files = str(rows_file(tmp_path / "train.parquet", 12))
    plain, _ = prepare(config, RunFolder(tmp_path / "run"))
    assert not (root / f"sft_job-{os.getuid()}").exists()
    config.data.use_shm = True
    cache, _ = prepare(config, RunFolder(tmp_path / "run"), shm=root)
    assert cache.folder == plain.folder  # the same rows: no second cache
    assert cache.origin(3) == (tmp_path / "train.parquet", 3)
    (copy,) = entries(root)
    (copy / "0" / "train.parquet").unlink()
    rows_file(copy / "0" / "train.parquet", 5, seed=1)
    read = prepare(config, RunFolder(tmp_path / "run"), shm=root)[0]
    expected = open_or_build(spec(copy / "0" / "train.parquet"), tmp_path / "cache", 1)
    assert [read.row(row).ids.tolist() for row in range(5)] == [expected.row(row).ids.tolist() for row in range(5)]
    config.data.max_length = 20
    with pytest.raises(ProblemsError) as raised:
        prepare(config, RunFolder(tmp_path / "run"), shm=root)
    assert f"{tmp_path / 'train.parquet'} row " in str(raised.value)
    assert str(root) not in str(raised.value)
