"""Secrets of the environment, also those that the settings use, are nowhere in what a run shows and leaves."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Job, end

CANARIES = {
    "WANDB_API_KEY": "c0ffee" * 6 + "c0de",
    "HF_TOKEN": "hf_CanaryOfTheHub",
    "AWS_SECRET_ACCESS_KEY": "Canary/Of+The/Cloud",
    "MY_PASSWORD": "canary of somebody's own",
}
USED = [
    "trainer.experiment_name=run-${oc.env:MY_PASSWORD}",
    "trainer.project_name=${oc.env:HF_TOKEN}",
    "data.apply_chat_template_kwargs.note=${oc.env:AWS_SECRET_ACCESS_KEY}",
]


def files_with_canaries(folder: Path) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            forms = {name: (value, value.replace("'", "\\'"), repr(value)[1:-1]) for name, value in CANARIES.items()}
            found += [f"{path}: {name}" for name, all_ in forms.items() if any(f.encode() in content for f in all_)]
    return found


def command_lines(process: subprocess.Popen[str]) -> set[bytes]:
    """Arguments of every process there is, again and again while this one runs."""
    seen: set[bytes] = set()
    while process.poll() is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.add(path.read_bytes())
            except OSError:
                continue
        time.sleep(0.05)
    return seen


@pytest.fixture
def secret_job(inputs: Path, tmp_path: Path) -> Job:
    home = tmp_path / "home"
    home.mkdir()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    offline = {"WANDB_MODE": "offline", "HOME": str(home), "TMPDIR": str(temporary)}
    return Job(inputs, tmp_path, CANARIES | offline)


def test_no_secret_is_in_what_a_run_leaves(secret_job: Job) -> None:
    process = secret_job.start(
        "trainer.total_training_steps=2", "trainer.save_freq=1", *USED, "trainer.logger=[console,wandb]"
    )
    try:
        lines = command_lines(process)
        out, err = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, err
    assert any(b"sft_job.train" in line for line in lines)
    assert not [line for line in lines for value in CANARIES.values() if value.encode() in line]
    assert list(secret_job.run.glob("wandb/**/*.wandb"))
    assert "<secret MY_PASSWORD>" in (secret_job.run / "checkpoints" / "final" / "state.json").read_text()
    assert "${oc.env:MY_PASSWORD}" in (secret_job.run / "logs" / "config.yaml").read_text()
    assert not [name for name, value in CANARIES.items() if value in out + err]
    assert files_with_canaries(secret_job.root) == []


@pytest.mark.slow
def test_a_run_goes_on_with_another_key(secret_job: Job) -> None:
    assert secret_job("trainer.total_training_steps=1", *USED).returncode == 0
    again = secret_job(
        "trainer.total_training_steps=2", *USED, MY_PASSWORD="another canary", HF_TOKEN="hf_AnotherCanary"
    )
    assert again.returncode == 0, again.stderr
    assert "another canary" not in again.stdout + again.stderr
    assert "changed since the checkpoint: trainer.experiment_name" not in again.stdout


@pytest.mark.parametrize(
    "broken",
    [
        "data.train_files=${oc.env:MY_PASSWORD}",
        "model.partial_pretrain=${oc.env:HF_TOKEN}",
        "data.truncation=${oc.env:AWS_SECRET_ACCESS_KEY}",
        "data.custom_cls.path=${oc.env:HF_TOKEN}",
        "model.external_lib=${oc.env:HF_TOKEN}",
        "optim.lr=${oc.env:MY_PASSWORD}",
        "trainer.default_hdfs_dir=s3://user:${oc.env:HF_TOKEN}@nowhere/runs",
    ],
)
def test_no_secret_is_in_an_error(secret_job: Job, broken: str) -> None:
    result = secret_job(broken)
    assert result.returncode in (2, 65, 66, 73, 137), result.stderr
    assert not [name for name, value in CANARIES.items() if value in result.stdout + result.stderr]
    assert "Traceback" not in result.stderr
    assert files_with_canaries(secret_job.root) == []


def test_no_secret_is_in_a_traceback(secret_job: Job, tmp_path: Path) -> None:
    """A user's own class fails in every process that loads it, with a secret in its message."""
    own = tmp_path / "own.py"
    own.write_text(
        "import os\n\n"
        "class Rows:\n"
        "    def __init__(self, *_, **__):\n"
        "        raise ValueError(os.environ['MY_PASSWORD'])\n"
    )
    result = secret_job(f"data.custom_cls.path={own}", "data.custom_cls.name=Rows")
    assert result.returncode != 0
    assert CANARIES["MY_PASSWORD"] not in result.stdout + result.stderr
    own.unlink()
    assert files_with_canaries(secret_job.root) == []
