"""Which paths of a run a container sees."""

from __future__ import annotations

import pytest

from sft_job.config.schema import JobConfig
from sft_job.jobfile.mounts import Mount, parse_mount
from sft_job.jobfile.seen import paths_of, unseen

MOUNTS = [parse_mount(each) for each in ("/data", "/models:/in/models", "/runs/one:rw", "/runs/one/fixed:ro")]


def faults(path: str, name: str = "data.train_files", mounts: list[Mount] = MOUNTS) -> list[str]:
    return [problem.rule for problem in unseen({name: path}, mounts)]


@pytest.mark.parametrize(
    "path",
    [
        "/data/train.parquet",
        "/data",
        "/data/../data/a.parquet",
        "/data/*/part-?.parquet",
        "/in/models/base",
        "/runs/one/x",
        "/opt/sft-job/code/recipe.yaml",
        "/d*/train.parquet",  # a mount lies below the folder before the wildcard
    ],
)
def test_what_is_mounted_is_seen(path: str) -> None:
    assert faults(path) == []


@pytest.mark.parametrize(
    "path", ["/database/train.parquet", "/models/base", "/data/../etc/x", "/home/me/*.parquet", "/tmp/x.parquet"]
)
def test_what_is_not_mounted_is_not(path: str) -> None:
    assert faults(path) == ["is seen by no mount of the container"]


@pytest.mark.parametrize("path", ["train.parquet", "./data/x", "~/x.parquet"])
def test_relative_paths_begin_elsewhere(path: str) -> None:
    assert faults(path) == ["is no absolute path: in the container it would begin at /"]


@pytest.mark.parametrize(
    ("path", "good"), [("/runs/one/cache", True), ("/runs/one/fixed/x", False), ("/data/c", False)]
)
def test_a_cache_is_written_to(path: str, good: bool) -> None:
    assert faults(path, "data.cache_dir") == ([] if good else ["is not mounted for the job to write there"])


def test_the_fix_can_be_pasted() -> None:
    (problem,) = unseen({"data.val_files": "/home/me/*.parquet"}, MOUNTS)
    assert problem.fix == "add it: mounts: [/home/me]"
    (problem,) = unseen({"data.cache_dir": "/home/me/cache"}, MOUNTS)
    assert problem.fix == "add it: mounts: [/home/me/cache:rw]"


def test_paths_of_settings_in_every_form() -> None:
    config = JobConfig()
    config.data.train_files = {"one": {"files": ["/a.parquet", "/b.parquet"], "weight": 1}, "two": "/c.parquet"}
    config.data.val_files = ["/d.parquet", "hf://set/e.parquet"]
    config.model.partial_pretrain = "/m"
    assert paths_of(config) == {
        "model.partial_pretrain": "/m",
        "data.train_files.one[0]": "/a.parquet",
        "data.train_files.one[1]": "/b.parquet",
        "data.train_files.two": "/c.parquet",
        "data.val_files[0]": "/d.parquet",
    } | {name: path for name, path in paths_of(JobConfig()).items() if name not in ("model.partial_pretrain",)}
