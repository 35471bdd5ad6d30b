from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurm.controller import job_state, queue_again
from tests.unit.slurm.controller import Controller, job_line


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


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``slurm(line, later)``: a controller that counts restarts as Slurm does."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return lambda line, later="": Controller(tmp_path, line, later)


@pytest.mark.parametrize(
    ("state", "end", "limit", "ended", "timed_out"),
    [
        ("RUNNING", "2026-11-23T16:00:00", "01:00:00", False, False),
        ("COMPLETING", "2026-11-23T16:00:00", "01:00:00", True, True),
        ("COMPLETING", "2026-11-23T16:00:29", "01:00:00", True, True),
        ("COMPLETING", "2026-11-23T15:59:59", "01:00:00", True, False),
        ("COMPLETING", "2026-11-24T16:00:00", "1-01:00:00", True, True),
        ("COMPLETING", "2026-11-24T15:00:00", "1-01:00:00", True, False),
        ("COMPLETING", "2026-11-24T15:00:00", "UNLIMITED", True, False),
        ("COMPLETING", "Unknown", "01:00:00", True, False),
        ("CANCELLED", "2026-11-23T16:00:29", "01:00:00", True, False),
    ],
)
def test_a_job_that_slurm_has_ended(slurm, state: str, end: str, limit: str, ended: bool, timed_out: bool) -> None:
    slurm(job_line(state, end=end, limit=limit))
    found = job_state("12")
    assert found is not None
    assert (found.ended, found.timed_out) == (ended, timed_out)


def test_once_and_done(slurm) -> None:
    controller = slurm(job_line())
    assert queue_again("12", 0, lambda text: None)
    show = "show job --oneliner 12"
    assert controller.asked() == [show, "requeue Incomplete 12", show]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_scancel_stays_one(slurm, state: str) -> None:
    """Also where a preemption began before it."""
    controller = slurm(job_line(state, preempted="2026-11-23T15:30:00", end="2026-11-23T15:30:10"))
    said: list[str] = []
    assert not queue_again("12", 0, said.append, pauses=(0, 0))
    assert (said, controller.requeues()) == (["job 12 was cancelled: not queued again"], 0)


def test_a_scancel_between_our_look_and_our_request(slurm) -> None:
    controller = slurm(job_line(), later=job_line("COMPLETING", end="2026-11-23T15:30:10"))
    said: list[str] = []
    assert not queue_again("12", 0, said.append, pauses=(0, 0))
    assert controller.requeues() == 1
    assert said == ["scontrol requeue 12: nothing was done", "job 12 was cancelled: not queued again"]


def test_a_scancel_between_two_tries(slurm, tmp_path: Path) -> None:
    controller = slurm(job_line(), later=job_line("COMPLETING", end="2026-11-23T15:30:10"))
    tool = tmp_path / "scontrol"
    refused = f'[ "$1" = show ] || {{ echo requeue >> {tmp_path}/asked; exit 1; }}\ncd '
    tool.write_text(tool.read_text().replace("cd ", refused, 1))
    assert not queue_again("12", 0, lambda text: None, pauses=(0, 0))
    show = "show job --oneliner 12"
    assert controller.asked() == [show, "requeue", show]


def test_a_time_limit_is_undone(slurm) -> None:
    controller = slurm(job_line("COMPLETING"))
    assert queue_again("12", 0, lambda text: None)
    assert controller.asked()[1] == "requeue 12"


def test_a_requeue_whose_answer_was_lost_is_ours(slurm, tmp_path: Path) -> None:
    controller = slurm(job_line())
    tool = tmp_path / "scontrol"
    tool.write_text(tool.read_text() + '[ "$1" = show ] || exit 1\n')
    said: list[str] = []
    assert queue_again("12", 0, said.append, pauses=(0, 0))
    assert (controller.requeues(), len(said)) == (1, 1)


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
    at = f"echo JobState=RUNNING Restarts=$([ -e {tmp_path}/done ] && echo 1 || echo 0)"
    answer = f"[ -e {tmp_path}/back ] && {at}; touch {tmp_path}/back"
    asked = scontrol(answer, f"touch {tmp_path}/done")
    assert queue_again("12", 0, lambda text: None, pauses=(0, 0))
    assert asked.read_text().split() == ["show", "show", "requeue", "show"]


def test_a_requeue_that_fails_is_asked_for_again(scontrol) -> None:
    asked = scontrol("echo JobState=RUNNING Restarts=0", "echo no contact >&2; exit 1")
    said: list[str] = []
    assert not queue_again("12", 0, said.append, pauses=(0, 0))
    assert asked.read_text().split() == ["show", "requeue"] * 2
    assert said[0] == "scontrol requeue 12: no contact"
