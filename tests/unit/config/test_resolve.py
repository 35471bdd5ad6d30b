from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sft_job.config.resolve import Resolution, resolve
from sft_job.contract import ExitCode
from sft_job.errors import problems_text, worst_code

ROOT = Path(__file__).parents[3]
SEED = ROOT / "tests" / "golden" / "seed_sft_trainer.yaml"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    sizes = {"num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 2, "hidden_size": 56}
    (folder / "config.json").write_text(json.dumps({**sizes, "model_type": "qwen2", "max_position_embeddings": 1024}))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


def resolved(model: Path, *overrides: str, **environ: str) -> Resolution:
    variables = {"CHECKPOINT_DIR": "/runs", "NPROC_PER_NODE": "8", **environ}
    return resolve(str(SEED), [f"model.partial_pretrain={model}", *overrides], variables, 0)


def test_the_seed_resolves(model: Path):
    found = resolved(model)
    assert found.problems == [], problems_text(found.problems)
    assert found.topology.world == 8
    assert found.model is not None
    assert found.model.num_attention_heads == 28
    (warning,) = found.warnings
    assert "data.max_length = 128,000 is beyond the model's 1,024 positions" in warning


def test_the_seed_as_users_bring_it_lacks_only_the_model():
    found = resolve(str(SEED), [], {"NPROC_PER_NODE": "8"}, 0)
    (problem,) = found.problems
    assert (problem.code, problem.subject, problem.origin) == (
        ExitCode.MODEL,
        "model.partial_pretrain",
        "seed_sft_trainer.yaml:26",
    )


def test_problems_of_all_kinds_in_order(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text(
        "trainer:\n  log_freq: 0\n  seeds: 3\ndata:\n  max_length: x\n  truncation: cut\n  train_files: a\n"
        "model:\n  partial_pretrain: /nowhere\n  lora_rank: -8\nulysses_sequence_parallel_size: 3\n"
    )
    found = resolve(str(path), ["optim.lr=-1"], {"CHECKPOINT_DIR": "/runs", "NPROC_PER_NODE": "4"}, 0)
    assert [(problem.subject, problem.origin) for problem in found.problems] == [
        ("trainer.log_freq", "job.yaml:2"),
        ("trainer.seeds", "job.yaml:3"),
        ("data.max_length", "job.yaml:5"),
        ("data.truncation", "job.yaml:6"),
        ("model.lora_rank", "job.yaml:10"),
        ("ulysses_sequence_parallel_size", "job.yaml:11"),
        ("optim.lr", "command line"),
        ("model.partial_pretrain", "job.yaml:9"),
    ]
    assert worst_code(found.problems) is ExitCode.CONFIG


def test_what_must_be_set(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("trainer: {seed: 1}")
    found = resolve(str(path), [], {"CHECKPOINT_DIR": "/runs"}, 0)
    assert [problem.subject for problem in found.problems] == ["data.train_files", "model.partial_pretrain"]
    assert all(problem.rule == "must be set" for problem in found.problems)


def test_a_file_that_is_no_yaml_is_one_problem(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("data: {")
    found = resolve(str(path), [], {}, 0)
    assert [problem.subject for problem in found.problems] == [str(path)]


@pytest.mark.parametrize("override", ["data.train_files={a", "model.partial_pretrain=[x]", "model.path={a: 1}"])
def test_a_faulty_setting_is_one_problem(tmp_path: Path, override: str):
    path = tmp_path / "job.yaml"
    path.write_text("trainer: {seed: 1}")
    both = {"data.train_files": "data.train_files=a", "model.partial_pretrain": f"model.partial_pretrain={tmp_path}"}
    name = override.partition("=")[0].replace("model.path", "model.partial_pretrain")
    others = [text for key, text in both.items() if key != name]
    found = resolve(str(path), [override, *others], {"CHECKPOINT_DIR": "/runs"}, 0)
    about = [each for each in found.problems if each.code is ExitCode.CONFIG]
    assert [each.subject for each in about] == [override.partition("=")[0]]


def test_unknown_ranks_raise_no_second_problem(model: Path):
    found = resolved(model, NPROC_PER_NODE="many")
    assert [problem.subject for problem in found.problems] == ["NPROC_PER_NODE"]


def test_a_random_start_needs_no_weights(model: Path):
    (model / "model.safetensors").unlink()
    assert [problem.code for problem in resolved(model).problems] == [ExitCode.MODEL]
    assert resolved(model, "model.init=random").problems == []


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, pkgutil, importlib, sft_job.config as package\n"
        "names = [each.name for each in pkgutil.iter_modules(package.__path__)]\n"
        "assert len(names) > 5, names\n"
        "for name in names: importlib.import_module(f'sft_job.config.{name}')\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# run_sft.sh


def start(script: Path, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": path, **variables}
    command = ["/bin/bash", str(script), "optim.lr=2e-5", "trainer.experiment_name=a b"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def fake_command(folder: Path) -> None:
    folder.mkdir(parents=True)
    command = folder / "sft-job"
    command.write_text('#!/bin/bash\nprintf "%s|" "$0" "$@" "$CONFIG_PATH"\nexit 65\n')
    command.chmod(0o755)


def test_run_sft_passes_everything_on(tmp_path: Path):
    fake_command(tmp_path / "bin")
    done = start(ROOT / "run_sft.sh", f"{tmp_path / 'bin'}:{os.defpath}", CONFIG_PATH="/c d")
    expected = [f"{tmp_path}/bin/sft-job", "train", "optim.lr=2e-5", "trainer.experiment_name=a b", "/c d", ""]
    assert done.stdout.split("|") == expected
    assert done.returncode == 65


def test_run_sft_takes_the_repositorys_environment(tmp_path: Path):
    checkout = tmp_path / "check out"
    fake_command(checkout / ".venv" / "bin")
    (checkout / "run_sft.sh").write_bytes((ROOT / "run_sft.sh").read_bytes())
    done = start(checkout / "run_sft.sh", "/usr/bin:/bin")
    assert done.stdout.startswith(f"{checkout}/.venv/bin/sft-job|train|optim.lr=2e-5|")
    assert done.returncode == 65


def test_run_sft_without_an_installation(tmp_path: Path):
    (tmp_path / "run_sft.sh").write_bytes((ROOT / "run_sft.sh").read_bytes())
    done = start(tmp_path / "run_sft.sh", "/usr/bin:/bin")
    assert done.returncode == 2
    assert "pip install" in done.stderr
