"""`sft-job status` on runs of the real command: going on, killed, refused, done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.integration.conftest import Job, end
from tests.integration.test_train import children_of, wait_for_step

pytestmark = pytest.mark.slow


def status(job: Job, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sft_job.cli", "status", *arguments]
    return subprocess.run(command, env=job.variables(), capture_output=True, text=True, timeout=60, check=False)


def fields(job: Job, *arguments: str) -> dict:
    result = status(job, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_from_the_first_step_to_the_end(job: Job) -> None:
    nothing = status(job)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "there is no such folder" in nothing.stderr
    process = job.start("trainer.total_epochs=200", "trainer.save_freq=2")
    try:
        wait_for_step(job, 4)
        now = fields(job, str(job.run / "logs"))
        assert (now["state"], now["holder"]["pid"], now["total_steps"]) == ("running", process.pid, 400)
        assert now["step"] >= 4
        assert now["seconds_left"] > 0
        assert now["loss"] > 0
        for rank in children_of(process):
            os.kill(rank, signal.SIGKILL)
        process.kill()
        process.communicate(timeout=60)
    finally:
        end(process)
    killed = fields(job)
    assert (killed["state"], killed["code"], killed["holder"]["gone"]) == ("lost", None, True)
    assert killed["checkpoint"]["fault"] == ""
    short = f"trainer.total_training_steps={killed['checkpoint']['step'] + 2}"
    assert job("trainer.total_epochs=200", short, "optim.lr=3").returncode == 2
    refused = status(job)
    assert refused.returncode == 0
    assert "failed with exit code 2 (config)" in refused.stdout
    assert "optim.lr = 3.0" in refused.stdout
    assert (
        job("trainer.total_epochs=200", short, "trainer.allow_changed=[trainer.total_training_steps]").returncode == 0
    )
    done = fields(job, str(job.root / "ckpt"))
    assert (done["state"], done["code"], done["refusal"]) == ("done", 0, None)
    assert done["step"] == done["total_steps"]
    assert [each["cause"] for each in done["restarts"]] == ["lost", "config"]
    assert done["result"].endswith("huggingface")
