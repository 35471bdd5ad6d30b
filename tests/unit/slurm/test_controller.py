from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurm.controller import job_state, queue_again


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(show: str, requeue: str) -> Path:
        tool = tmp_path / "scontrol"
        tool.write_text(f"#!/bin/bash\necho $1 >> {tmp_path}/asked\ncase $1 in show) {show};; *) {requeue};; esac\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path / "asked"

    return make


def test_what_the_controller_says(scontrol) -> None:
    scontrol("echo JobId=12 JobName=JobState=x Restarts=3 JobState=RUNNING", "false")
    state = job_state("12")
    assert state is not None
    assert (state.restarts, state.state) == (3, "x")  # a name with = in it is not allowed by the job file
    scontrol("exit 1", "false")
    assert job_state("12") is None


@pytest.mark.parametrize(
    ("said", "preempted"),
    [
        ("None", False),
        ("N/A", False),
        ("", False),
        ("2026-11-23T16:00:00", True),
        ("2026-11-23T14:00:00", False),  # of an earlier start
    ],
)
def test_preempted(scontrol, said: str, preempted: bool) -> None:
    times = f"StartTime=2026-11-23T15:00:00 PreemptEligibleTime=2026-11-23T15:00:00 PreemptTime={said}"
    scontrol(f"echo JobState=RUNNING Restarts=0 {times}", "false")
    state = job_state("12")
    assert state is not None
    assert state.preempted is preempted


def test_once_and_done(scontrol) -> None:
    asked = scontrol("echo JobState=RUNNING Restarts=0", "true")
    assert queue_again("12", 0, lambda text: None)
    assert asked.read_text().split() == ["show", "requeue"]


def test_a_late_node_asks_for_nothing(scontrol) -> None:
    asked = scontrol("echo JobState=RUNNING Restarts=1", "true")
    said: list[str] = []
    assert not queue_again("12", 0, said.append)
    assert "already" in said[0]
    assert asked.read_text().split() == ["show"]


def test_without_an_answer_nothing_is_asked_for(scontrol) -> None:
    """Slurm may have started the job elsewhere meanwhile."""
    asked = scontrol("exit 1", "true")
    said: list[str] = []
    assert not queue_again("12", 0, said.append, pauses=(0, 0))
    assert asked.read_text().split() == ["show"] * 2
    assert said[0] == "scontrol show job 12: no answer"
    assert "by hand: scontrol requeue 12" in said[-1]


def test_a_controller_that_comes_back(scontrol, tmp_path: Path) -> None:
    answer = f"[ -e {tmp_path}/back ] && echo JobState=RUNNING Restarts=0; touch {tmp_path}/back"
    asked = scontrol(answer, "true")
    assert queue_again("12", 0, lambda text: None, pauses=(0, 0))
    assert asked.read_text().split() == ["show", "show", "requeue"]


def test_a_requeue_that_fails_is_asked_for_again(scontrol) -> None:
    asked = scontrol("echo JobState=RUNNING Restarts=0", "echo no contact >&2; exit 1")
    said: list[str] = []
    assert not queue_again("12", 0, said.append, pauses=(0, 0))
    assert asked.read_text().split() == ["show", "requeue"] * 2
    assert said[0] == "scontrol requeue 12: no contact"
