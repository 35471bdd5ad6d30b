"""What the supervisor promises when ranks freeze, processes are signalled, ports are taken and starts fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sft_job.lock import this_process
from tests.integration.conftest import end
from tests.integration.test_train import children_of, gone, metrics, outcome, wait_for_step

ROOT = Path(__file__).parents[2]
LONG = "trainer.total_epochs=200"


def descendants(pid: int) -> set[int]:
    """A process's children, and theirs, whatever session they are in."""
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def in_shared_memory() -> set[str]:
    """Names in /dev/shm but for semaphores, which other tests' pools of processes make and remove."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}  # noqa: PTH208


def signal_all(pid: int, number: signal.Signals) -> None:
    """As a scheduler does that signals every process of a job step."""
    for each in (pid, *descendants(pid)):
        try:
            os.kill(each, number)
        except ProcessLookupError:
            continue


@pytest.mark.slow
def test_a_frozen_rank_ends_the_others_and_leaves_stacks(job) -> None:
    process = job.start(LONG, "trainer.timeout_seconds=8", NPROC_PER_NODE="2")
    try:
        wait_for_step(job, 2)
        ranks = children_of(process)
        os.kill(ranks[1], signal.SIGSTOP)
        _, error = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 137, error
    assert re.search(r"rank 1 made no progress for \d+ s while training, after step \d+; its process is stopped", error)
    assert "Traceback" not in error
    logs = job.run / "logs"
    # The main thread of the rank that waited, in its collective.
    stack = (logs / "rank_0.log").read_text()
    assert "most recent call first" in stack
    assert "trainer.py" in stack
    assert "supervisor: rank 1 made no progress" in (logs / "rank_1.log").read_text()
    assert outcome(job)["message"].startswith("rank 1 made no progress")
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
def test_a_killed_supervisor_leaves_nothing(job, tmp_path) -> None:
    """Neither the settings, which may hold secrets, nor the folder in which it met its ranks."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = job.start(LONG, "trainer.project_name=canary-in-settings", NPROC_PER_NODE="2", TMPDIR=str(temporary))
    try:
        wait_for_step(job, 1)
        (folder,) = temporary.glob("sft_job_*")
        assert not [path for path in folder.iterdir() if b"canary-in-settings" in path.read_bytes()]
        ranks = children_of(process)
        process.kill()
        assert all(gone(rank) for rank in ranks)
    finally:
        end(process)
    assert not list(temporary.glob("sft_job_*"))


@pytest.mark.slow
def test_every_process_signalled_twice_saves_once_and_leaves_nothing(job, tmp_path) -> None:
    """Ranks that have started processes of their own, one of them deaf; stacks on request; TERM, then USR1 to all."""
    (tmp_path / "my_lib.py").write_text(
        "import subprocess\n"
        "for command in ('sleep 1000', \"trap '' TERM USR1; while :; do sleep 1; done\"):\n"
        "    child = subprocess.Popen(['setsid', 'sh', '-c', command])\n"
        f"    open('{tmp_path}/children', 'a').write(f'{{child.pid}}\\n')\n"
    )
    memory = in_shared_memory()
    lib = "model.external_lib=my_lib"
    process = job.start(LONG, lib, NPROC_PER_NODE="2", PYTHONPATH=f"{tmp_path}:{ROOT}")
    try:
        wait_for_step(job, 2)
        process.send_signal(signal.SIGQUIT)
        deadline = time.monotonic() + 20
        while "most recent call first" not in (job.run / "logs" / "rank_1.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        signal_all(process.pid, signal.SIGTERM)
        time.sleep(0.05)
        signal_all(process.pid, signal.SIGUSR1)
        _, error = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 143, error
    saved = outcome(job)["step"]
    assert [path.name for path in (job.run / "checkpoints").glob("global_step_*")] == [f"global_step_{saved}"]
    assert metrics(job)[-1]["step"] == saved
    children = [int(line) for line in (tmp_path / "children").read_text().split()]
    assert len(children) >= 4
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert in_shared_memory() <= memory
    assert not (job.run / "logs" / ".lock").exists()


@pytest.mark.slow
def test_a_finished_run_and_faults_of_settings_need_no_writable_folder(job) -> None:
    """Here the folder for logs is a file, as nothing is read-only for root."""
    short = "trainer.total_training_steps=1"
    assert job(short).returncode == 0
    shutil.rmtree(job.run / "logs")
    (job.run / "logs").write_text("")
    again = job(short)
    assert (again.returncode, again.stderr) == (0, "")
    assert "already done" in again.stdout
    changed = job(short, "optim.lr=0.5")
    assert changed.returncode == 2, changed.stderr
    assert "optim.lr" in changed.stderr
    (job.run / "logs").unlink()
    (job.run / "logs").mkdir()
    (job.run / "logs" / "outcome.json").write_text("of the finished run")
    assert job(short, "optim.lr=0.5").returncode == 2
    assert (job.run / "logs" / "outcome.json").read_text() == "of the finished run"


def test_ends_before_the_ranks_are_told_in_the_run_folder(job) -> None:
    """Of settings, of data and of checkpoints; where nobody else holds it, and only if its place is there."""
    wrong = "optim.lrr=1"
    assert job(wrong).returncode == 2
    assert not job.run.parent.exists()
    job.run.parent.mkdir()
    assert job(wrong).returncode == 2
    assert (outcome(job)["code"], outcome(job)["reason"]) == (2, "config")
    assert "optim.lrr" in outcome(job)["message"]
    assert job("data.train_files=/nowhere/train.parquet").returncode == 65
    assert outcome(job)["code"] == 65
    (job.run / "checkpoints" / "global_step_2").mkdir(parents=True)
    unusable = job()
    assert unusable.returncode == 74, unusable.stderr
    assert outcome(job)["code"] == 74
    assert [restart["cause"] for restart in outcome(job)["restarts"]] == ["config", "data"]
    assert not (job.run / "logs" / ".lock").exists()
    holder = replace(this_process({"SFT_JOB_ID": "other"}), host="elsewhere", place="elsewhere")
    (job.run / "logs" / ".lock").write_bytes(holder.record())
    assert job(wrong).returncode == 2
    assert outcome(job)["code"] == 74


def test_every_process_signalled_while_tokenising(job) -> None:
    process = job.start("data.num_workers=2")
    try:
        deadline = time.monotonic() + 60
        while not (job.run / "logs" / "prepare.log").exists() or not descendants(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        signal_all(process.pid, signal.SIGUSR2)
        _, error = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 143, error
    assert "nothing to save" in error


@pytest.mark.slow
def test_a_deadline_saves_in_time(job) -> None:
    """On a slow machine the time may be too short for a first step: then nothing is begun."""
    result = job(LONG, "trainer.max_wall_seconds=25")
    assert result.returncode == 143, result.stderr
    record = outcome(job)
    assert record["message"].startswith("deadline: ")
    assert len(list((job.run / "checkpoints").glob("global_step_*"))) == (record["step"] > 0)
    assert ("stopped while there was time to save" in result.stderr) == (record["step"] > 0)


@pytest.mark.slow
def test_starts_that_come_no_further_end_with_86(job) -> None:
    """Here each start fails because its port is taken."""
    twice = "trainer.max_starts_without_progress=2"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for _ in range(2):
            failed = job(twice, MASTER_PORT=port)
            assert failed.returncode == 137
            assert f"MASTER_PORT = {port}: the ranks cannot meet there: Address already in use" in failed.stderr
        refused = job(twice)
    assert refused.returncode == 86
    assert refused.stderr.count(f"lost: MASTER_PORT = {port}") == 2
    assert "trainer.max_starts_without_progress" in refused.stderr
    assert not (job.run / "logs" / "rank_0.log").exists()
    assert outcome(job)["code"] == 86
    assert [restart["cause"] for restart in outcome(job)["restarts"]] == ["lost"] * 2


@pytest.mark.slow
def test_a_run_that_lost_its_folder_ends_and_writes_nothing(job) -> None:
    process = job.start(LONG, NPROC_PER_NODE="2")
    try:
        wait_for_step(job, 2)
        thief = replace(this_process({"SFT_JOB_ID": "thief"}), host="elsewhere")
        temporary = job.run / "logs" / "thief"
        temporary.write_bytes(thief.record())
        temporary.replace(job.run / "logs" / ".lock")
        _, error = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 73, error
    assert "was taken over by another run (process" in error
    assert "job thief" in error
    assert outcome(job)["reason"] == "running"
    assert not list((job.run / "checkpoints").glob("global_step_*"))
    assert json.loads((job.run / "logs" / ".lock").read_text())["job"] == "thief"
