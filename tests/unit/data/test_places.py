from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_job.data.cache import CacheSpec, DamagedCacheError, open_or_build
from sft_job.data.places import open_places, write_places
from tests.unit.data.conftest import rows_file


def test_ranks_open_what_was_prepared_without_the_files(spec: Callable[..., CacheSpec], tmp_path: Path) -> None:
    files = [rows_file(tmp_path / f"{name}.parquet", count) for name, count in (("train", 6), ("val", 3))]
    train, val = (open_or_build(spec(file), tmp_path / "cache", 1) for file in files)
    for file in files:
        file.unlink()
    write_places(tmp_path, train, val)
    opened, opened_val = open_places(tmp_path)
    assert opened_val is not None
    assert [(cache.folder, cache.num_rows) for cache in (opened, opened_val)] == [(train.folder, 6), (val.folder, 3)]
    assert opened.row(5).ids.tolist() == train.row(5).ids.tolist()
    assert opened.fingerprint == train.fingerprint


def test_without_validation(spec: Callable[..., CacheSpec], tmp_path: Path) -> None:
    write_places(tmp_path, open_or_build(spec(rows_file(tmp_path / "a.parquet", 2)), tmp_path / "cache", 1), None)
    assert open_places(tmp_path)[1] is None


def test_nothing_noted_and_a_cache_that_is_gone(spec: Callable[..., CacheSpec], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"caches\.json"):
        open_places(tmp_path)
    cache = open_or_build(spec(rows_file(tmp_path / "a.parquet", 2)), tmp_path / "cache", 1)
    write_places(tmp_path, cache, None)
    shutil.rmtree(cache.folder)
    with pytest.raises(DamagedCacheError):
        open_places(tmp_path)
