from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode, RunFolder
from sft_job.data.cache import cache_spec
from sft_job.data.columns import Column
from sft_job.data.prepare import prepare
from sft_job.data.workers import _cgroup_cores, available_cores
from sft_job.errors import ProblemsError
from tests.unit.data.conftest import CHATML, rows_file, write


@pytest.fixture
def config(model_folder: Path, tmp_path: Path) -> JobConfig:
    config = JobConfig()
    config.model.partial_pretrain = str(model_folder)
    config.data.train_files = str(rows_file(tmp_path / "train.parquet", 12))
    config.data.val_files = str(rows_file(tmp_path / "val.parquet", 5, seed=1))
    return config


def test_both_splits_are_prepared_in_the_run_folder(config: JobConfig, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    train, val = prepare(config, run)
    assert val is not None
    assert (train.num_rows, val.num_rows) == (12, 5)
    assert {train.folder.parent, val.folder.parent} == {run.cache}
    report = json.loads(run.data_report.read_text())
    (train_report,), (val_report,) = report["train"], report["val"]
    assert (train_report["name"], train_report["rows_usable"]) == ("train", 12)
    assert (val_report["name"], val_report["files"][0]["path"]) == ("val", config.data.val_files)
    assert sorted(path.name for path in run.logs.iterdir()) == ["data_report.json", "rejected_rows.parquet"]


def test_another_cache_folder_and_no_validation(config: JobConfig, tmp_path: Path) -> None:
    config.data.cache_dir = str(tmp_path / "shared")
    config.data.val_files = None
    run = RunFolder(tmp_path / "run")
    train, val = prepare(config, run)
    assert val is None
    assert train.folder.parent == tmp_path / "shared"
    assert json.loads(run.data_report.read_text())["val"] == []


def test_everything_wrong_with_both_splits_is_said_at_once(config: JobConfig, tmp_path: Path) -> None:
    config.data.train_files = str(tmp_path / "gone.parquet")
    config.data.val_files = str(write(tmp_path / "bad.parquet", prompt=[1], response=["r"]))
    with pytest.raises(ProblemsError) as raised:
        prepare(config, RunFolder(tmp_path / "run"))
    assert [problem.subject for problem in raised.value.problems] == ["data.train_files", "data.prompt_key"]
    assert not (tmp_path / "run").exists()
    config.model.partial_pretrain = None
    with pytest.raises(ProblemsError) as raised:
        prepare(config, RunFolder(tmp_path / "run"))
    assert [problem.code for problem in raised.value.problems] == [ExitCode.DATA, ExitCode.MODEL]
    assert raised.value.code is ExitCode.DATA


def test_rows_of_both_splits_are_looked_at(config: JobConfig, tmp_path: Path) -> None:
    config.data.max_length = 20
    with pytest.raises(ProblemsError) as raised:
        prepare(config, RunFolder(tmp_path / "run"))
    train, val = raised.value.problems
    assert "of 12 rows are longer" in train.rule
    assert "of 5 rows are longer" in val.rule


def test_a_spec_from_a_config(config: JobConfig, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    config.data.chat_template = str(tmp_path / "chat.jinja")
    config.data.prompt_key = OmegaConf.create(["a", "b"])
    config.data.response_dict_keys = ["x", "y"]
    config.data.apply_chat_template_kwargs = OmegaConf.create({"enable_thinking": False})  # type: ignore[assignment]
    config.data.val_max_samples = 3
    spec = cache_spec(config, "val")
    assert spec is not None
    assert spec.files == (tmp_path / "val.parquet",)
    assert spec.prompt == (Column("data.prompt_key", "a"), Column("data.prompt_key", "b"))
    assert spec.response == (Column("data.response_key", "response", ("x", "y")),)
    assert (spec.chat_template, spec.template_kwargs, spec.max_samples) == (CHATML, {"enable_thinking": False}, 3)
    assert cache_spec(config, "train").max_samples == -1  # type: ignore[union-attr]
    config.data.val_files = None
    assert cache_spec(config, "val") is None


def test_cores_of_a_container(tmp_path: Path) -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    assert _cgroup_cores(tmp_path) is None
    for text, cores in (("max 100000", None), ("350000 100000", 3), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert _cgroup_cores(tmp_path) == cores
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, cores in (("-1", None), ("200000", 2)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
        assert _cgroup_cores(tmp_path) == cores
