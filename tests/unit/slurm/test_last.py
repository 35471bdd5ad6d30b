"""The batch script's end, by bash itself: an srun that is given, and a scontrol that writes down what it is asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from sft_job.jobfile.schema import JobFile
from slurm.ends import Ends
from slurm.plan import Plan
from slurm.render import render
from slurm.requeue import read_restarts
from slurm.settings import SlurmSettings
from slurm.task import run_node


def end_of(folder: Path, code: int, state: str = "RUNNING", restarts: int = 0) -> tuple[int, list[str], str]:
    """Run the script of a job whose srun ends with this code: its own code, what scontrol was asked, what it said."""
    plan = Plan.of(
        {"folder": str(folder), "config": "/c/sft.yaml", "checkpoint_dir": str(folder), "python": sys.executable}
    )
    DelayedSubmission(run_node, plan.values()).dump(folder / "12_submitted.pkl")
    shown = f"JobState={state} Restarts={restarts} StartTime=2026-11-23T15:00:00 PreemptTime=None"
    asked = folder / "asked"
    for name, text in (
        ("srun", f"exit {code}"),
        ("scontrol", f'echo "$@" >> {asked}; [ $1 = show ] && echo "{shown}"; exit 0'),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    script = folder / "script"
    script.write_text(render(JobFile(config="/c/sft.yaml"), SlurmSettings(), plan))
    environ = {name: each for name, each in os.environ.items() if not name.startswith("SLURM_")}
    environ |= {"SLURM_JOB_ID": "12", "PATH": f"{folder}:{environ['PATH']}"}
    done = subprocess.run(["bash", script], env=environ, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, asked.read_text().splitlines() if asked.exists() else [], done.stderr


def test_a_task_that_srun_killed_is_judged_by_the_script(tmp_path: Path) -> None:
    ends = Ends(tmp_path, "12", 0)
    ends.begin()
    code, asked, said = end_of(tmp_path, 1)
    assert (code, asked[-1]) == (137, "requeue 12")
    assert "srun ended the task of node 0" in said
    assert [each.cause for each in read_restarts(tmp_path / "12_restarts.json")] == ["loss"]
    # What the script did it does not do twice.
    again, asked_again, _ = end_of(tmp_path, 1)
    assert (again, asked_again) == (137, asked)


@pytest.mark.parametrize(("state", "restarts"), [("CANCELLED", 0), ("COMPLETING", 1)])
def test_a_job_that_slurm_has_ended_or_queued_itself(tmp_path: Path, state: str, restarts: int) -> None:
    Ends(tmp_path, "12", 0).begin()
    _, asked, _ = end_of(tmp_path, 137, state, restarts)
    assert asked
    assert not [each for each in asked if re.match("requeue", each)]


def test_an_error_of_the_user_s_that_a_node_saw(tmp_path: Path) -> None:
    ends = Ends(tmp_path, "12", 0)
    ends.begin()
    ends.put(1, 65)
    code, asked, _ = end_of(tmp_path, 137)
    assert code == 65
    assert "requeue 12" not in asked


def test_what_node_0_judged_is_the_script_s_code(tmp_path: Path) -> None:
    ends = Ends(tmp_path, "12", 0)
    ends.begin()
    ends.settle(86)
    assert end_of(tmp_path, 143) == (86, [], "")


def test_a_task_that_never_began(tmp_path: Path) -> None:
    assert end_of(tmp_path, 3) == (3, [], "")
