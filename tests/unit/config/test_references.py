from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_job.config.references import adapter_warnings, check_references
from sft_job.config.schema import JobConfig, ModelConfig, TrainerConfig
from sft_job.contract import ExitCode
from sft_job.errors import Problem


def origin(key: str) -> str:
    return f"job.yaml:{len(key)}"


def check(**sections: Any) -> list[Problem]:
    return check_references(JobConfig(**sections), origin)


def adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "use_dora": False, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_nothing_named_is_nothing_wrong():
    assert check() == []
    assert adapter_warnings(JobConfig(), origin) == []


# An adapter to go on from


def test_an_adapter_is_accepted(tmp_path: Path):
    assert check(model=ModelConfig(lora_adapter_path=str(adapter(tmp_path / "a")))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "says peft_type 'IA3'; this job trains LORA"),
        ({"r": 0}, "says r = 0; it must be a whole number from 1"),
        ({"r": True}, "says r = True"),
        ({"lora_alpha": None}, "says lora_alpha = None; it must be a number above 0"),
        ({"use_dora": True}, "sets use_dora; this job trains plain LoRA only"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "sets modules_to_save, bias"),
    ],
)
def test_an_adapter_of_another_kind(tmp_path: Path, changes: dict[str, Any], said: str):
    (problem,) = check(model=ModelConfig(lora_adapter_path=str(adapter(tmp_path / "a", **changes))))
    assert (problem.code, problem.subject) == (ExitCode.MODEL, "model.lora_adapter_path")
    assert said in problem.rule


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no folder", "there is no such folder"),
        ("no config", "it lacks adapter_config.json"),
        ("no weights", "it lacks adapter_model.safetensors"),
        ("no json", "cannot be read"),
        ("a list", "is no JSON object"),
    ],
)
def test_a_folder_that_is_no_adapter(tmp_path: Path, damage: str, said: str):
    folder = adapter(tmp_path / "a")
    if damage == "no folder":
        folder = tmp_path / "b"
    elif damage == "no config":
        (folder / "adapter_config.json").unlink()
    elif damage == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    else:
        (folder / "adapter_config.json").write_text("{" if damage == "no json" else "[]")
    (problem,) = check(model=ModelConfig(lora_adapter_path=str(folder)))
    assert said in problem.rule
    assert problem.code == ExitCode.MODEL == 66
    assert problem.origin == origin("model.lora_adapter_path")
    assert adapter_warnings(JobConfig(model=ModelConfig(lora_adapter_path=str(folder), lora_rank=3)), origin) == []


def test_the_adapters_own_rank_holds(tmp_path: Path):
    folder = str(adapter(tmp_path / "a"))
    same = ModelConfig(lora_adapter_path=folder, lora_rank=8, lora_alpha=16)
    assert adapter_warnings(JobConfig(model=same), origin) == []
    unset = ModelConfig(lora_adapter_path=folder, lora_alpha=99)
    assert adapter_warnings(JobConfig(model=unset), lambda _: "") == []
    other = ModelConfig(lora_adapter_path=folder, lora_rank=4, lora_alpha=32)
    assert adapter_warnings(JobConfig(model=other), origin) == [
        "model.lora_rank = 4 (job.yaml:15), but the adapter in model.lora_adapter_path has 8: 8 it is",
        "model.lora_alpha = 32 (job.yaml:16), but the adapter in model.lora_adapter_path has 16: 16 it is",
    ]


def test_adapter_settings_without_adapters():
    model = ModelConfig(lora_alpha=32, target_modules=["q_proj"])
    assert adapter_warnings(JobConfig(model=model), origin) == [
        "model.lora_alpha, model.target_modules: not used, because model.lora_rank is 0"
    ]
    model.lora_rank = 8
    assert adapter_warnings(JobConfig(model=model), origin) == []


# A module to import


def test_a_module_beside_the_run_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "beside_the_run.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    for name in ("beside_the_run", "beside_the_run.models", "json", "yaml"):
        assert check(model=ModelConfig(external_lib=name)) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_here", "Python finds no such module"),
        ("./mine.py", "must be the name of a Python module"),
        (".mine", "must be the name of a Python module"),
        ("a..b", "must be the name of a Python module"),
    ],
)
def test_a_module_that_cannot_be_imported(name: str, said: str):
    (problem,) = check(model=ModelConfig(external_lib=name))
    assert problem.subject == "model.external_lib"
    assert said in problem.rule


# A remote folder


@pytest.mark.parametrize("url", ["hdfs:///runs/a", "s3://bucket", "memory://a", "file:///elsewhere", "../elsewhere"])
def test_remote_folders(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    trainer = TrainerConfig(default_hdfs_dir=url, default_local_dir=str(tmp_path / "run"))
    assert check(trainer=trainer) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "must be a path, or a URL"),
        ("S 3://a", "must be a path, or a URL"),
        ("{}", "lies in the run folder"),
        ("{}/copy", "lies in the run folder"),
        ("file://{}/copy", "lies in the run folder"),
        ("a\0b", "cannot be looked at"),
    ],
)
def test_remote_folders_that_cannot_be_used(tmp_path: Path, url: str, said: str):
    trainer = TrainerConfig(default_hdfs_dir=url.format(tmp_path), default_local_dir=str(tmp_path))
    (problem,) = check(trainer=trainer)
    assert (problem.code, problem.subject) == (ExitCode.CONFIG, "trainer.default_hdfs_dir")
    assert said in problem.rule
