"""Which paths of a run a container sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_job.config.schema import JobConfig
from sft_job.jobfile.mounts import Mount, parse_mount
from sft_job.jobfile.seen import Sight, paths_of, unseen, unseen_module

MOUNTS = [parse_mount(each) for each in ("/data", "/models:/in/models", "/runs/one:rw", "/runs/one/fixed:ro")]


def judged(path: str, name: str = "data.train_files", **sight: Any) -> tuple[list[str], list[str]]:
    """Rules by which a path is refused, and by which it is only told."""
    refused, unproven = unseen({name: path}, Sight(sight.pop("mounts", MOUNTS), **sight))
    return [each.rule for each in refused], [each.rule for each in unproven]


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
    assert judged(path, sources_here=False) == ([], [])


@pytest.mark.parametrize("path", ["/database/train.parquet", "/models/base", "/data/../etc/x", "/home/me/*.parquet"])
def test_what_is_not_mounted_may_be_in_the_image(path: str) -> None:
    rule = "is seen by no mount of the container: it would have to be in the image"
    assert judged(path) == ([], [rule])
    more = ", or be mounted by the cluster or by options of yours"
    assert judged(path, closed=False) == ([], [rule + more])


@pytest.mark.parametrize("path", ["train.parquet", "./data/x", "~/x.parquet"])
def test_relative_paths_begin_elsewhere(path: str) -> None:
    assert judged(path) == (["is no absolute path: in the container it would begin at /"], [])
    assert judged(path, closed=False) == ([], ["is no absolute path: in the container it may begin at another folder"])


@pytest.mark.parametrize("path", ["/tmp/x.parquet", "/dev/shm/rows/*.parquet"])
def test_what_is_made_with_the_container_holds_no_data(path: str) -> None:
    assert judged(path) == (["is seen by no mount of the container"], [])
    assert judged(path, closed=False)[0] == []


def test_what_this_machine_has_and_no_mount_shows_was_forgotten() -> None:
    for path in ("/etc/passwd", "/etc/*.parquet", "/etc"):
        assert judged(path, mounts=[]) == (["is seen by no mount of the container"], [])
        # Where the container may see more, or runs elsewhere, the same name may be in its image.
        assert judged(path, mounts=[], closed=False)[0] == []
        assert judged(path, mounts=[], sources_here=False)[0] == []
    assert judged("/etc/not-there.parquet", mounts=[])[0] == []


@pytest.mark.parametrize("name", ["data.cache_dir", "trainer.default_hdfs_dir"])
@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("/runs/one/cache", True),
        ("/tmp/cache", True),
        ("/dev/shm/cache", True),
        ("/runs/one/fixed/x", False),
        ("/data/c", False),
        ("/opt/sft-job/c", False),
    ],
)
def test_a_cache_is_written_to(name: str, path: str, good: bool) -> None:
    rules = [] if good else ["is not mounted for the job to write there"]
    assert judged(path, name) == (rules, [])
    assert judged(path, name, closed=False) == ([], rules)


def test_the_fix_can_be_pasted() -> None:
    def fix(name: str, path: str, **sight: Any) -> str:
        (found,) = itertools.chain(*unseen({name: path}, Sight(MOUNTS, **sight)))
        return found.fix

    assert fix("data.val_files", "/home/me/*.parquet") == "add it: mounts: [/home/me]"
    assert fix("data.cache_dir", "/home/me/cache") == "add it: mounts: [/home/me/cache:rw]"
    assert fix("data.chat_template", "/a.jinja") == "add it: mounts: [/a.jinja]"
    claims = "kubernetes.claims: [CLAIM:{}]"
    assert fix("model.partial_pretrain", "/base", add=claims) == "add it: kubernetes.claims: [CLAIM:/base]"
    assert fix("data.train_files", "rows/a.parquet", add=claims) == (
        "data.train_files=/absolute/path/to/a.parquet, and kubernetes.claims: [CLAIM:/absolute/path/to] unless that "
        "folder is seen already"
    )


def test_what_a_mount_shows_may_not_be_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("/only/in/the/container")
    mounts = [Mount(str(tmp_path), "/data")]
    for path in ("/data", "/data/there", "/data/there/*.parquet", "/data/link"):
        assert judged(path, mounts=mounts) == ([], [])
    for path in ("/data/lost", "/data/there/a.parquet"):
        assert judged(path, mounts=mounts) == ([], ["there is no such file or folder on this machine"])
        assert judged(path, mounts=mounts, sources_here=False) == ([], [])
    assert judged("/data/lost/*", mounts=mounts) == ([], ["there is no such folder on this machine"])
    # Told with the run's settings already; made by the run.
    for name in ("model.partial_pretrain", "trainer.default_local_dir"):
        assert judged("/data/lost", name, mounts=[Mount(str(tmp_path), "/data", True)]) == ([], [])


def test_without_a_container_the_job_s_own_machine_has_the_last_word(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.parquet").touch()
    here = {"data.train_files[0]": "a.parquet", "data.train_files[1]": "~/a.parquet", "data.cache_dir": "/not/yet"}
    assert unseen(here, None) == ([], [])
    refused, (problem,) = unseen({"data.custom_cls.path": "mine.py"}, None, lambda name: f"sft.yaml:{len(name)}")
    assert not refused
    assert problem.line() == (
        "sft.yaml:20: data.custom_cls.path = 'mine.py': there is no such file or folder on this machine (fix: correct "
        "the path, unless the job finds it there)"
    )


class TestModules:
    """``model.external_lib``."""

    def told(self, name: str | None, mounts: Sequence[Mount] = (), python_path: str = "") -> str:
        config = JobConfig()
        config.model.external_lib = name
        problem = unseen_module(config, Sight(mounts), python_path)
        return "" if problem is None else problem.text()

    def test_what_every_image_has(self) -> None:
        assert [self.told(name) for name in (None, "json.decoder", "sft_job.model")] == ["", "", ""]

    def test_what_is_installed_here_may_be_missing_there(self) -> None:
        assert self.told("yaml").splitlines() == [
            "model.external_lib = 'yaml'",
            "    would have to be installed in the image, or lie in a mounted folder of PYTHONPATH",
            "    fix: install it in the image",
        ]

    @pytest.mark.parametrize("file", ["mine_of_mine.py", "mine_of_mine/__init__.py"])
    def test_what_lies_in_a_folder_is_proved_by_mount_and_variable(self, tmp_path: Path, monkeypatch, file) -> None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        monkeypatch.chdir(tmp_path)
        name, mounts = "mine_of_mine.models", [Mount(str(tmp_path), "/code")]
        fix = f"or mounts: [{tmp_path}] and environment: {{PYTHONPATH: {tmp_path}}}"
        assert fix in self.told(name)
        assert fix in self.told(name, mounts)
        assert fix in self.told(name, (), "/code")
        assert self.told(name, mounts, "/opt/other:/code") == ""


@pytest.mark.parametrize(
    ("value", "path"),
    [("/t/chat.jinja", True), ("chat.jinja", True), ("{{ bos_token }}{% for m in messages %}", False), (None, False)],
)
def test_a_chat_template_is_a_path_where_it_is_no_template(value: str | None, path: bool) -> None:
    config = JobConfig()
    config.data.chat_template = value
    assert paths_of(config) == ({"data.chat_template": value} if path else {})


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
