"""The verb: on real files, in this process, and once as users start it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sft_job.cli import app
from sft_job.config.load import load_config, run_folder
from sft_job.data.prepare import prepare
from tests.tiny import save_model, write_rows

Plan = Callable[..., Result]
NAMES = ("PET_", "NPROC", "CONFIG_", "CHECKPOINT", "NNODES", "CUDA_VISIBLE")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    write_rows(folder / "train.parquet", 600)
    write_rows(folder / "val.parquet", 5, seed=1)
    (folder / "config.yaml").write_text(
        f"data: {{train_files: {folder}/train.parquet, val_files: {folder}/val.parquet, max_length: 256, "
        f"train_batch_size: 8}}\nmodel: {{partial_pretrain: {folder}/model}}\n"
        f"trainer: {{default_local_dir: {folder}/run, n_gpus_per_node: 2}}\n"
    )
    return folder


@pytest.fixture
def plan(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    for name in [name for name in os.environ if name.startswith(NAMES)]:
        monkeypatch.delenv(name)

    def run(*words: str) -> Result:
        result = CliRunner().invoke(app, ["plan", str(inputs / "config.yaml"), *words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_tables(plan: Plan) -> None:
    result = plan("--gpu", "h100", "--length", "128", "--gpus", "1")
    assert result.exit_code == 0, result.stderr
    for part in ("qwen3:", "fits:", "weights", "matrix products", "tok/s per GPU", "model.recompute=full", "run of"):
        assert part in result.stdout
    assert "\x1b" not in result.stdout


def test_numbers_of_gpus(plan: Plan) -> None:
    """As told; else as the settings say; else one."""
    options = ("--gpu", "h200", "--length", "64", "--json")
    assert json.loads(plan(*options).stdout)["ranks"]["gpus"] == 2
    told = json.loads(plan(*options, "--gpus", "4", "--nodes", "2", "ulysses_sequence_parallel_size=2").stdout)["ranks"]
    assert told == {"gpus": 4, "nodes": 2, "data_parallel": 4, "ulysses": 2, "shards": 8}
    assert plan(*options, "--gpus", "3", "ulysses_sequence_parallel_size=2").exit_code == 2


def test_what_does_not_fit_is_said_by_the_exit_code(plan: Plan) -> None:
    result = plan("--length", "1000000", "data.max_length=1000000", "--gpu", "h100", "--gpu-memory", "2", "--gpus", "1")
    assert result.exit_code == 88, result.stdout
    assert "does not fit" in result.stdout
    assert "smallest change that fits: " in result.stdout


def test_own_data_in_a_sample_and_in_the_cache(plan: Plan, inputs: Path) -> None:
    options = ("--gpu", "h200", "--gpus", "1", "--json")
    sample = json.loads(plan(*options).stdout)
    assert not sample["data"]["exact"]
    assert sample["data"]["rows"] == pytest.approx(599, abs=2)  # one row has no response
    assert sample["largest_micro_batch"]["longest_document"] == 256
    config = load_config(str(inputs / "config.yaml"), [], {}).config
    rows, _ = prepare(config, run_folder(config))
    warm = json.loads(plan(*options).stdout)
    assert warm["data"]["exact"]
    assert warm["data"]["rows"] == rows.num_rows
    assert "token cache" in warm["data"]["source"]
    assert warm["largest_micro_batch"]["longest_document"] == max(rows.lengths)
    assert warm["run"]["steps"] == -(-rows.num_rows // 8) * 4


def test_no_run_folder_is_needed(plan: Plan, inputs: Path, tmp_path: Path) -> None:
    text = (inputs / "config.yaml").read_text().replace(f"default_local_dir: {inputs}/run, ", "")
    assert "default_local_dir" not in text
    (tmp_path / "bare.yaml").write_text(text)
    words = ["plan", str(tmp_path / "bare.yaml"), "--gpu", "h200", "--length", "64", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr


def test_no_weights_are_needed(plan: Plan, inputs: Path, tmp_path: Path) -> None:
    for file in (inputs / "model").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    words = ("--gpu", "h200", "--length", "64", "--json")
    bare, whole = plan(*words, f"model.partial_pretrain={tmp_path}"), plan(*words)
    assert bare.exit_code == 0, bare.stderr
    assert bare.stdout == whole.stdout


def test_host_memory_is_asked_for_or_told(plan: Plan) -> None:
    words = ("--gpu", "h200", "--length", "64", "--gpus", "1")
    asked = plan(*words).stdout
    assert re.search(r"needs \d+\.\d GiB of host memory on a node.*--host-memory", asked)
    told = plan(*words, "--host-memory", "64")
    assert told.exit_code == 0
    assert "of host memory on a node, of 64.0" in told.stdout
    short = plan(*words, "--host-memory", "2", "--json")
    assert short.exit_code == 88
    assert json.loads(short.stdout)["memory_gib"]["host_room"] == 2


def test_bad_input(plan: Plan, tmp_path: Path) -> None:
    wrong = plan("--gpu", "h20o", "--length", "64", "data.train_batch_sise=3")
    assert wrong.exit_code == 2
    assert "did you mean h20" in wrong.stderr
    assert "data.train_batch_size" in wrong.stderr
    assert plan(f"data.train_files={tmp_path}/none.parquet").exit_code == 65
    assert plan(f"model.partial_pretrain={tmp_path}", "--length", "64").exit_code == 66


def test_as_users_start_it_without_torch(inputs: Path) -> None:
    """On a login node: from settings and footers alone, no tokenizer and no torch is loaded."""
    code = (
        "import sys; sys.argv[0] = 'sft-job'\nfrom sft_job.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(NAMES)}
    words = ["plan", str(inputs / "config.yaml"), "--gpu", "h200", "--gpus", "1", "--length", "64", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environ, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "fits"
    assert done.stderr.strip().splitlines()[-1] == "False"


def test_help() -> None:
    text = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    for part in ("--gpus", "--nodes", "--gpu", "--length", "--json", "88 where it does not"):
        assert part in text
