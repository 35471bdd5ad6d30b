"""The process on a node, with real children; Slurm's words are given."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_job.contract import RunFolder
from sft_job.processes import state
from sft_job.submissions import read_judgement, read_requeue
from slurm.allocation import Allocation
from slurm.ends import Ends, Peers
from slurm.listener import WARNING
from slurm.plan import FIRST_PREFLIGHT, ONLY_PREFLIGHT, Plan
from slurm.requeue import Restart, read_restarts, write_restarts
from slurm.task import job_variables
from tests.unit.slurm.controller import Controller, job_line

CANCELLED = job_line("COMPLETING", end="2026-11-23T15:30:00")
PREEMPTED = job_line(preempted="2026-11-23T15:30:00")
HERE = Allocation("12", 1, 1, ("n3", "n4"), 2e9)


def plan(tmp_path: Path, **more: object) -> Plan:
    values = {"folder": str(tmp_path), "config": "/home/me/sft.yaml", "checkpoint_dir": "/runs/one", **more}
    return Plan.of({"python": sys.executable, **values})


def test_the_contract_s_variables(tmp_path: Path) -> None:
    stale = {"PET_NNODES": "7", "RANK": "3", "CHECKPOINT_DIR": "/other", "MASTER_PORT": "1", "PATH": "/bin", "X": "1"}
    given = plan(tmp_path, ranks_per_node=8, gpus_per_node=8, interface="ib0", environment={"X": "2"})
    found = job_variables(given, HERE, stale)
    assert found == {
        "PATH": "/bin",
        "X": "2",
        "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "ib0",
        "CONFIG_PATH": "/home/me",
        "CONFIG_NAME": "sft.yaml",
        "CHECKPOINT_DIR": "/runs/one",
        "NPROC_PER_NODE": "8",
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "n3",
        "MASTER_PORT": str(10_000 + 12 * 7 + 1),
        "SFT_JOB_ID": "12",
        "SFT_JOB_GPUS_PER_NODE": "8",
        "SFT_JOB_END_TIME": "1999999990.0",
    }


def test_one_node_needs_no_meeting_place(tmp_path: Path) -> None:
    found = job_variables(plan(tmp_path), Allocation("12", 0, 0, ("n3",), None), {})
    assert found["SFT_JOB_ID"] == "12"
    assert not {"MASTER_ADDR", "MASTER_PORT", "SFT_JOB_END_TIME"} & found.keys()


def test_interfaces_that_are_excluded_say_nothing_to_gloo(tmp_path: Path) -> None:
    found = job_variables(plan(tmp_path, interface="^docker0"), HERE, {})
    assert (found["NCCL_SOCKET_IFNAME"], "GLOO_SOCKET_IFNAME" in found) == ("^docker0", False)


RUN = """
import os, sys, time
from sft_job.contract import RunFolder
from sft_job.submissions import read_requeue
from slurm.allocation import Allocation
from slurm.plan import Plan
from slurm import task
task._GATHER_SECONDS = 3.0
folder, python, preflight, nodes, left = sys.argv[1:]
end = time.time() + float(left) if left else None
plan = Plan(folder, "/c/sft.yaml", folder, python, preflight=preflight, grace_seconds=5, retries={"loss": 1})
hosts = tuple("n%d" % each for each in range(int(nodes)))
sys.exit(task.Node(plan, Allocation("12", 0, 0, hosts, end), os.environ).run())
"""


class Task:
    """A node's process whose job is a shell script, and a scontrol that writes down what it is asked."""

    def __init__(
        self,
        folder: Path,
        job: str,
        preflight: str = "no",
        nodes: int = 1,
        line: str = job_line(),
        later: str = "",
        left: str = "",
    ) -> None:
        self.folder = folder
        self.controller = Controller(folder, line, later)
        python = self._tool("python", job)
        path = f"{folder}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), str(python), preflight, str(nodes), left],
            env={**os.environ, "PATH": path},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _tool(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    def ready(self) -> None:
        """Until its job runs."""
        deadline = time.monotonic() + 60
        while not (self.folder / "ready").exists():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.stderr.read() if self.process.stderr else ""
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def requeues(self) -> int:
        return self.controller.requeues()

    def causes(self) -> list[str]:
        return [each.cause for each in read_restarts(self.folder / "12_restarts.json")]


SAVES = """exec PYTHON -c '
import pathlib, signal, sys, time
stops = {signal.SIGTERM, signal.SIGUSR2}
assert stops <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
for number in stops:
    signal.signal(number, lambda *_: sys.exit(143))
signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
pathlib.Path("FOLDER/ready").touch()
time.sleep(60)
'"""
"""As the supervisor: it is started with signals blocked, and unblocks them once it listens."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Task]]:
    """Starts tasks in this test's folder; nothing of them is left at its end."""
    started: list[Task] = []

    def make(job: str, **more: Any) -> Task:
        started.append(Task(tmp_path, job, **more))
        return started[-1]

    yield make
    for task in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(task.process.pid, signal.SIGKILL)
        task.process.wait()


Start = Callable[..., Task]


def saves(folder: Path) -> str:
    return SAVES.replace("PYTHON", sys.executable).replace("FOLDER", str(folder))


def test_done(start: Start, tmp_path: Path) -> None:
    task = start('echo "$@" > $(dirname $0)/arguments')
    code, said = task.end()
    assert (code, task.requeues()) == (0, 0)
    assert "node 0: done" in said
    assert (tmp_path / "arguments").read_text() == "-P -m sft_job.cli train /c/sft.yaml\n"
    assert Ends(tmp_path, "12", 0).all() == {0: 0}


def test_a_warning_is_passed_on_and_queues_again_once(start: Start, tmp_path: Path) -> None:
    task = start(saves(tmp_path))
    task.ready()
    task.process.send_signal(signal.SIGUSR2)
    task.process.send_signal(signal.SIGUSR2)
    assert task.end()[0] == 143
    assert task.requeues() == 1
    assert [(each.start, each.cause) for each in read_restarts(tmp_path / "12_restarts.json")] == [(0, "preemption")]


@pytest.mark.parametrize(("left", "preempted", "cause"), [
    ("60", "2026-11-23T16:00:00", "preemption"),
    ("9999", "None", "preemption"),
    ("", "None", "timeout"),
])  # fmt: skip
def test_slurm_s_warning(start: Start, tmp_path: Path, left: str, preempted: str, cause: str) -> None:
    task = start(saves(tmp_path), left=left, line=job_line(preempted=preempted))
    task.ready()
    task.process.send_signal(WARNING)
    code, said = task.end()
    assert (code, task.requeues()) == (143, 1)
    assert "Slurm warns: the job saves and leaves" in said
    assert [each.cause for each in read_restarts(tmp_path / "12_restarts.json")] == [cause]


def test_of_a_time_limit_the_clock_takes_care(start: Start, tmp_path: Path) -> None:
    """Slurm warns up to a minute early; the grace is five seconds here, and 15 are kept to leave."""
    began = time.monotonic()
    task = start(saves(tmp_path), left="23")
    task.ready()
    task.process.send_signal(WARNING)
    code, said = task.end()
    assert (code, task.requeues()) == (143, 1)
    assert time.monotonic() - began > 3
    assert "the time limit is near: the job saves and leaves" in said
    assert "Slurm warns" not in said
    assert [each.cause for each in read_restarts(tmp_path / "12_restarts.json")] == ["timeout"]


def test_a_job_that_hears_nothing_is_killed_before_slurm_ends_the_task(start: Start, tmp_path: Path) -> None:
    """With all that it started: ranks have sessions of their own."""
    began = time.monotonic()
    ranks = f"setsid sleep 300 & echo $! > {tmp_path}/rank; touch {tmp_path}/ready"
    task = start(f"trap '' TERM INT HUP USR1 USR2; {ranks}; while :; do sleep 1; done", left="13", nodes=2)
    task.ready()
    code, said = task.end()
    assert (code, task.requeues()) == (137, 1)
    assert time.monotonic() - began < 11
    assert "the job saves and leaves" in said
    assert "has not left: it is killed" in said
    assert [each.cause for each in read_restarts(tmp_path / "12_restarts.json")] == ["loss"]
    rank = int((tmp_path / "rank").read_text())
    assert state(rank) in ("", "Z")


def test_the_newest_checkpoint_and_the_requeue_are_noted(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sft" / "checkpoints").mkdir(parents=True)
    (tmp_path / "sft" / "logs").mkdir()
    (tmp_path / "sft" / "checkpoints" / "latest").write_text("global_step_16")
    task = start(saves(tmp_path))
    task.ready()
    task.process.send_signal(signal.SIGUSR2)
    task.end()
    assert [each.step for each in read_restarts(tmp_path / "12_restarts.json")] == [16]
    waits = read_requeue(RunFolder(tmp_path / "sft"))
    assert waits is not None
    assert (waits.launcher, waits.job) == ("slurm", "12")
    said = read_judgement(RunFolder(tmp_path / "sft"))
    assert said is not None
    assert (str(said), said.why, said.counts) == (
        "slurm job 12, start 0", "preemption number 1: queued again", {"preemption": 1},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("job", "why"),
    [
        ("exit 2", "exit code 2 would be the same the next time: not queued again"),
        ("exit 137", "Slurm has ended the job (scancel, or a preemption that cancels): not queued again"),
    ],
)
def test_why_it_is_not_queued_again_is_noted_for_status(start: Start, tmp_path: Path, job: str, why: str) -> None:
    (tmp_path / "sft" / "logs").mkdir(parents=True)
    start(job, line=CANCELLED).end()
    said = read_judgement(RunFolder(tmp_path / "sft"))
    assert said is not None
    assert (said.why, said.counts) == (why, {})


def test_scancel_is_passed_on_and_queues_nothing(start: Start, tmp_path: Path) -> None:
    task = start(saves(tmp_path))
    task.ready()
    task.process.terminate()
    code, said = task.end()
    assert (code, task.requeues()) == (143, 0)
    assert "Slurm decides" in said
    assert not (tmp_path / "12_restarts.json").exists()


def test_a_step_that_srun_ends_after_a_loss_queues_again(start: Start, tmp_path: Path) -> None:
    """srun sends TERM where it misses a node; Slurm says that the job itself runs on."""
    task = start(saves(tmp_path).replace("sys.exit(143)", "sys.exit(137)"))
    task.ready()
    task.process.send_signal(signal.SIGTERM)
    assert task.end()[0] == 137
    assert task.requeues() == 1


def test_a_preemption_without_a_warning_queues_again(start: Start, tmp_path: Path) -> None:
    task = start(saves(tmp_path), line=PREEMPTED)
    task.ready()
    task.process.terminate()
    assert (task.end()[0], task.requeues()) == (143, 1)
    assert task.causes() == ["preemption"]


@pytest.mark.parametrize("left", ["", "16"])
@pytest.mark.parametrize("preempted", ["None", "2026-11-23T15:29:00"])
def test_a_scancel_shows_as_completing(start: Start, tmp_path: Path, preempted: str, left: str) -> None:
    """Also in a preemption's grace, and with less than ten seconds to the time limit."""
    task = start(
        saves(tmp_path).replace("sys.exit(143)", "(time.sleep(5), sys.exit(143))" if left else "sys.exit(143)"),
        line=job_line("COMPLETING", preempted=preempted, end="2026-11-23T15:30:00"),
        left=left,
    )
    task.ready()
    task.process.terminate()
    code, said = task.end()
    assert (code in (137, 143), task.requeues(), task.causes()) == (True, 0, [])
    assert "Slurm has ended the job" in said


def test_a_preemption_without_any_grace_is_counted(start: Start, tmp_path: Path) -> None:
    """Slurm has queued the job again before its TERM is here."""
    (tmp_path / "sft" / "logs").mkdir(parents=True)
    task = start(saves(tmp_path), line=job_line("COMPLETING", 1, "2026-11-23T15:30:00", "2026-11-23T15:30:00"))
    task.ready()
    task.process.terminate()
    assert (task.end()[0], task.requeues(), task.causes()) == (143, 0, ["preemption"])
    said, waits = read_judgement(RunFolder(tmp_path / "sft")), read_requeue(RunFolder(tmp_path / "sft"))
    assert said is not None
    assert (said.why, said.counts) == ("preempted: Slurm has queued the job again itself", {"preemption": 1})
    assert waits is not None


def test_an_operator_s_requeue_is_slurm_s(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sft" / "logs").mkdir(parents=True)
    task = start(saves(tmp_path), line=job_line("COMPLETING", 1, end="2026-11-23T15:30:00"))
    task.ready()
    task.process.terminate()
    assert (task.end()[0], task.requeues(), task.causes()) == (143, 0, [])
    assert read_requeue(RunFolder(tmp_path / "sft")) is not None


def test_a_task_that_comes_late_writes_nothing(start: Start, tmp_path: Path) -> None:
    """A node that was cut off: the job runs elsewhere, and has counted what came since."""
    (tmp_path / "sft" / "logs").mkdir(parents=True)
    known = (Restart(0, "scheduler", None), Restart(1, "loss", 137, 8))
    write_restarts(tmp_path / "12_restarts.json", known)
    task = start("exit 137", line=job_line(restarts=2))
    assert (task.end()[0], task.requeues()) == (137, 0)
    assert read_restarts(tmp_path / "12_restarts.json") == known
    assert read_judgement(RunFolder(tmp_path / "sft")) is None


def test_a_step_that_srun_ends_while_its_ranks_still_save(start: Start, tmp_path: Path) -> None:
    """srun sends TERM where it misses a node, which gives no word: not scancel --signal=TERM, which all nodes hear."""
    task = start(saves(tmp_path), nodes=2)
    task.ready()
    task.process.terminate()
    assert (task.end()[0], task.requeues(), task.causes()) == (137, 1, ["loss"])


def test_a_term_that_every_node_heard_queues_nothing(start: Start, tmp_path: Path) -> None:
    task = start(saves(tmp_path), nodes=2)
    task.ready()
    task.process.terminate()
    Ends(tmp_path, "12", 0).put(1, 143)
    assert (task.end()[0], task.requeues(), task.causes()) == (143, 0, [])


def test_what_became_of_the_job_is_left_for_the_batch_script(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sft" / "logs").mkdir(parents=True)
    start("exit 88").end()
    assert (tmp_path / "12_ends" / "0" / "settled").read_text() == "88\n"


def test_a_warned_job_that_was_cancelled_meanwhile_stays_so(start: Start, tmp_path: Path) -> None:
    task = start(saves(tmp_path), line=job_line(), later=CANCELLED)
    task.ready()
    task.process.send_signal(signal.SIGUSR2)
    code, said = task.end()
    assert (code, task.requeues()) == (143, 0)
    assert "was cancelled" in said
    assert read_restarts(tmp_path / "12_restarts.json") == ()


def test_an_error_of_the_user_s_is_no_reason_to_try_again(start: Start, tmp_path: Path) -> None:
    task = start("exit 2")
    code, said = task.end()
    assert (code, task.requeues()) == (2, 0)
    assert "exit code 2 would be the same the next time" in said


def test_a_lost_rank_is(start: Start, tmp_path: Path) -> None:
    task = start("kill -9 $$")
    assert (task.end()[0], task.requeues()) == (137, 1)


def test_preflight_comes_first(start: Start, tmp_path: Path) -> None:
    task = start(f"echo $4 >> {tmp_path}/verbs; [ $4 = train ] || exit 73", preflight=FIRST_PREFLIGHT)
    assert task.end()[0] == 73
    assert (tmp_path / "verbs").read_text() == "preflight\n"


def test_preflight_alone_never_trains_and_is_never_queued_again(start: Start, tmp_path: Path) -> None:
    task = start(f"echo $4 >> {tmp_path}/verbs; kill -9 $$", preflight=ONLY_PREFLIGHT)
    code, said = task.end()
    assert (code, task.requeues()) == (137, 0)
    assert (tmp_path / "verbs").read_text() == "preflight\n"
    assert "preflight failed" in said


def test_a_preflight_alone_has_a_time_that_the_grace_may_fill(start: Start, tmp_path: Path) -> None:
    """It has nothing to save: neither the clock nor a warning stops it."""
    task = start(f"touch {tmp_path}/ready; sleep 1.5", preflight=ONLY_PREFLIGHT, left="15", line=PREEMPTED)
    task.ready()
    task.process.send_signal(WARNING)
    code, said = task.end()
    assert (code, task.requeues()) == (0, 0)
    assert "preflight passed" in said
    assert "saves and leaves" not in said


def test_another_node_s_stop_is_this_one_s(start: Start, tmp_path: Path) -> None:
    task = start(saves(tmp_path), nodes=2)
    task.ready()
    Ends(tmp_path, "12", 0).put(1, 143)
    code, said = task.end()
    assert code == 143
    assert "another node ended with 143: this one's job is sent SIGUSR2" in said


def test_another_node_s_error_is_the_job_s(start: Start, tmp_path: Path) -> None:
    """This node's ranks only notice that the others are gone; the one that failed knows why."""
    task = start(f"touch {tmp_path}/ready; sleep 0.5; exit 137", nodes=2)
    task.ready()
    Ends(tmp_path, "12", 0).put(1, 88)
    assert (task.end()[0], task.requeues()) == (88, 0)


def test_what_is_not_there(start: Start, tmp_path: Path) -> None:
    task = start("")
    task.process.kill()
    task.process.communicate()
    (tmp_path / "python").unlink()
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), "/no/python", "no", "1", ""],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "/no/python cannot be started on n0: No such file or directory" in run.stderr
    assert "Traceback" not in run.stderr


def test_peers_that_failed_are_given_time_to_be_noticed(tmp_path: Path) -> None:
    ends = Ends(tmp_path, "12", 0)
    peers = Peers(ends, 0)
    assert peers.wish(0.0, 10) is None
    ends.put(1, 0)
    assert peers.wish(5.0, 10) is None
    ends.put(2, 137)
    assert [peers.wish(at, 10) for at in (10.0, 40.0, 60.0, 70.0, 90.0, 91.0)] == [
        None, None, signal.SIGUSR2, None, signal.SIGKILL, None,
    ]  # fmt: skip


def test_a_node_that_hangs_after_the_run_is_done_is_ended(tmp_path: Path) -> None:
    ends = Ends(tmp_path, "12", 0)
    peers = Peers(ends, 1)
    ends.put(2, 0)
    assert [peers.wish(at, 10) for at in (0.0, 100.0)] == [None, None]  # not yet: node 0 says when
    ends.put(0, 0)
    assert [peers.wish(at, 10) for at in (110.0, 150.0, 155.0, 170.0, 185.0)] == [
        None, None, signal.SIGUSR2, None, signal.SIGKILL,
    ]  # fmt: skip


@pytest.mark.parametrize("job_id", ["1", "9999999", "12_3"])
def test_ports_are_below_those_of_the_kernel(job_id: str) -> None:
    ports = {Allocation(job_id, start, 0, ("n1",), None).port for start in range(50)}
    assert len(ports) == 50
    assert all(10_000 <= port < 30_000 for port in ports)
