"""The batch script's end, by bash itself: an srun that is given, and a scontrol that counts as Slurm does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from sft_job.jobfile.schema import JobFile
from slurm.ends import Ends
from slurm.plan import Plan
from slurm.render import render
from slurm.requeue import SRUN_FAILED, Restart, read_restarts, write_restarts
from slurm.settings import SlurmSettings
from slurm.task import run_node
from tests.unit.slurm.controller import Controller, job_line


class Script:
    """The batch script of job 12.

    Args:
        folder: of the script.
        srun: shell lines.
        line: what the controller says of the job.
        later: what it says from the second question on.
        setup: lines before srun.
        python: that runs the script's last word.
        left: seconds to the time limit.
    """

    def __init__(
        self,
        folder: Path,
        srun: str,
        line: str = job_line(),
        later: str = "",
        setup: tuple[str, ...] = (),
        python: str = sys.executable,
        left: float = 9999,
    ) -> None:
        values = {"folder": str(folder), "config": "/c/sft.yaml", "checkpoint_dir": str(folder), "python": python}
        plan = Plan.of(values)
        DelayedSubmission(run_node, plan.values()).dump(folder / "12_submitted.pkl")
        self.folder = folder
        self.controller = Controller(folder, line, later)
        (folder / "srun").write_text(f"#!/bin/bash\n{srun}\n")
        (folder / "srun").chmod(0o755)
        (folder / "script").write_text(render(JobFile(config="/c/sft.yaml"), SlurmSettings(setup=[*setup]), plan))
        self._environ = {name: each for name, each in os.environ.items() if not name.startswith("SLURM_")}
        self._environ |= {"SLURM_JOB_ID": "12", "SLURM_JOB_END_TIME": str(int(time.time() + left))}
        self._environ["PATH"] = f"{folder}:{os.environ['PATH']}"

    def begin(self) -> subprocess.Popen[str]:
        command = ["bash", str(self.folder / "script")]
        return subprocess.Popen(command, env=self._environ, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def end(self, running: subprocess.Popen[str] | None = None) -> tuple[int, str]:
        running = running or self.begin()
        _, said = running.communicate(timeout=60)
        return running.returncode, said

    def causes(self) -> list[str]:
        return [each.cause for each in read_restarts(self.folder / "12_restarts.json")]


def test_a_task_that_srun_killed_is_judged_by_the_script(tmp_path: Path) -> None:
    script = Script(tmp_path, "exit 137")
    code, said = script.end()
    assert (code, script.controller.requeues(), script.causes()) == (137, 1, ["loss"])
    assert "the task of node 0 did not live to say" in said
    # What the script did it does not do twice.
    assert (script.end()[0], script.controller.requeues()) == (137, 1)


@pytest.mark.parametrize("srun", [SRUN_FAILED, 134, 143, 165])
def test_srun_s_own_failure_is_a_loss(tmp_path: Path, srun: int) -> None:
    """It could not start the step: of the task there is no word at all."""
    script = Script(tmp_path, f'[ "$SLURM_EXIT_ERROR" = {SRUN_FAILED} ] && exit {srun}')
    assert script.end()[0] == 137
    assert (script.controller.requeues(), script.causes()) == (1, ["loss"])


@pytest.mark.parametrize("code", [1, 2, 73, 126, 127, 255])
def test_what_would_be_the_same_the_next_time_is_final(tmp_path: Path, code: int) -> None:
    """A bug in the task, a Python that is not there, an option that srun does not know."""
    script = Script(tmp_path, f"exit {code}")
    assert script.end()[0] == code
    assert (script.controller.requeues(), script.causes()) == (0, [])


@pytest.mark.parametrize("code", [137, 143, SRUN_FAILED])
@pytest.mark.parametrize(
    "line",
    [
        job_line("COMPLETING"),
        job_line("COMPLETING", end="2026-11-23T15:59:59"),
        job_line("COMPLETING", preempted="2026-11-23T15:30:00", end="2026-11-23T15:31:00"),
        job_line("CANCELLED"),
    ],
)
def test_a_scancel_stays_one(tmp_path: Path, code: int, line: str) -> None:
    """Slurm says COMPLETING of it, as long as processes live, and would take a requeue."""
    line = line.replace("EndTime=2026-11-23T16:00:00", "EndTime=2026-11-23T15:31:00")
    script = Script(tmp_path, f"exit {code}", line)
    _, said = script.end()
    assert "Slurm has ended the job" in said
    assert (script.controller.requeues(), script.causes()) == (0, [])


def test_what_slurm_ended_at_its_limit_is_queued_again(tmp_path: Path) -> None:
    script = Script(tmp_path, "exit 137", job_line("COMPLETING", end="2026-11-23T16:00:05"))
    assert script.end()[0] == 137
    assert "requeue 12" in script.controller.asked()
    assert script.causes() == ["loss"]


def test_a_late_script_leaves_the_counts_of_later_starts(tmp_path: Path) -> None:
    known = (Restart(0, "loss", 137), Restart(1, "timeout", 143, 8), Restart(2, "preemption", 143, 9))
    write_restarts(tmp_path / "12_restarts.json", known)
    script = Script(tmp_path, "exit 137", job_line(restarts=3))
    assert "started the job again meanwhile" in script.end()[1]
    assert (script.controller.requeues(), read_restarts(tmp_path / "12_restarts.json")) == (0, known)


@pytest.mark.parametrize(
    ("left", "preempted", "cause"),
    [(9999, "None", "loss"), (100, "None", "timeout"), (9999, "2026-11-23T15:30:00", "preemption")],
)
def test_ranks_that_left_and_a_task_that_could_not_judge(
    tmp_path: Path, left: float, preempted: str, cause: str
) -> None:
    Ends(tmp_path, "12", 0).put(0, 143)
    script = Script(tmp_path, "exit 137", job_line(preempted=preempted), left=left)
    assert script.end()[0] == (137 if cause == "loss" else 143)
    assert script.causes() == [cause]


def test_an_error_of_the_user_s_that_a_node_saw(tmp_path: Path) -> None:
    Ends(tmp_path, "12", 0).put(1, 65)
    script = Script(tmp_path, "exit 137")
    assert (script.end()[0], script.controller.requeues()) == (65, 0)


def test_what_node_0_judged_is_the_script_s_code(tmp_path: Path) -> None:
    Ends(tmp_path, "12", 0).settle(86)
    script = Script(tmp_path, "exit 143")
    assert script.end() == (86, "")
    assert script.controller.asked() == []


def test_nobody_can_judge(tmp_path: Path) -> None:
    script = Script(tmp_path, "rm $(dirname $0)/12_submitted.pkl; exit 137")
    code, said = script.end()
    assert code == 137
    assert "12_submitted.pkl cannot be read" in said
    assert "Traceback" not in said
    gone = Script(tmp_path, "exit 143", python="/no/python")
    code, said = gone.end()
    assert code == 143
    assert said.splitlines()[-1] == "slurm: nobody could judge how this start ended"
    assert gone.controller.requeues() == 0


@pytest.fixture
def struck() -> Iterator[Callable[..., tuple[int, str]]]:
    """Sends signals to the shell of a script, once a file is there."""
    running: list[subprocess.Popen[str]] = []

    def strike(script: Script, *numbers: signal.Signals, everyone: bool = False) -> tuple[int, str]:
        running.append(script.begin())
        deadline = time.monotonic() + 30
        while not (script.folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for number in numbers:
            (os.killpg if everyone else os.kill)(running[-1].pid, number)
        return script.end(running[-1])

    yield strike
    for each in running:
        if each.poll() is None:
            os.killpg(each.pid, signal.SIGKILL)
            each.wait()


@pytest.mark.parametrize("setup", [(), ("trap - TERM USR2; set -e",)])
def test_signals_to_the_shell_wait_until_srun_has_ended(
    tmp_path: Path, struck: Callable[..., tuple[int, str]], setup: tuple[str, ...]
) -> None:
    script = Script(tmp_path, "touch $(dirname $0)/ready; sleep 1; touch $(dirname $0)/over; exit 137", setup=setup)
    numbers = [getattr(signal, f"SIG{name}") for name in ["TERM", "USR1", "USR2", "HUP", "INT", "ALRM", "XCPU"]]
    assert struck(script, *numbers)[0] == 137
    assert (tmp_path / "over").exists()
    assert (script.controller.requeues(), script.causes()) == (1, ["loss"])


def test_a_set_up_line_that_a_signal_ends_is_no_mistake_of_the_user_s(
    tmp_path: Path, struck: Callable[..., tuple[int, str]]
) -> None:
    line = job_line("COMPLETING", end="2026-11-23T15:31:00")
    script = Script(tmp_path, "touch $(dirname $0)/over", line, setup=(f"touch {tmp_path}/ready; sleep 30",))
    code, said = struck(script, signal.SIGTERM, everyone=True)
    assert code == 143
    assert "slurm: a signal ended this line (exit code 143): touch" in said
    assert "correct slurm" not in said
    assert not (tmp_path / "over").exists()


def test_a_trap_of_the_set_up_lines_lives_beside_ours(tmp_path: Path) -> None:
    script = Script(tmp_path, "exit 137", setup=(f"trap 'touch {tmp_path}/cleaned' EXIT",))
    assert (script.end()[0], script.controller.requeues()) == (137, 1)
    assert (tmp_path / "cleaned").exists()


def test_a_signal_while_the_job_is_queued_again_does_not_undo_the_count(tmp_path: Path) -> None:
    """Slurm sends TERM to the whole job as it queues it again: to the script's last word, too."""
    script = Script(tmp_path, "exit 137")
    tool = tmp_path / "scontrol"
    tool.write_text(tool.read_text() + '[ "$1" = show ] || kill -TERM $PPID\n')
    script.end()
    assert script.causes() == ["loss"]
