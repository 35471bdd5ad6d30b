from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError
from sft_job.lock import Holder, RunLock, still_held, this_process

STILL, BEAT = 0.6, 0.05


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    return folder


def lock_of(run: RunFolder, job: str, **more: object) -> RunLock:
    me = replace(this_process({"SFT_JOB_ID": job}), **more)
    return RunLock(run, me, still_seconds=STILL, beat_seconds=BEAT)


def take(lock: RunLock, told: list[str] | None = None) -> RunLock:
    lock.acquire(stopped=lambda: False, tell=(told if told is not None else []).append)
    return lock


def abandoned(run: RunFolder, **more: object) -> Holder:
    """A lock whose holder says nothing any more, somewhere else."""
    holder = replace(this_process({"SFT_JOB_ID": "old"}), host="node7", place="elsewhere", **more)
    run.lock.write_bytes(holder.record())
    return holder


def test_taken_beaten_and_given_back(run) -> None:
    lock = take(lock_of(run, "a"))
    first = json.loads(run.lock.read_text())
    assert (first["pid"], first["job"], first["start"]) == (os.getpid(), "a", lock.token)
    time.sleep(8 * BEAT)
    assert json.loads(run.lock.read_text())["beat"] > first["beat"]
    assert still_held(run, lock.token)
    assert not still_held(run, "another")
    lock.release()
    assert list(run.logs.iterdir()) == []


def test_for_a_moment_only_what_nobody_holds(run) -> None:
    taken = take(lock_of(run, "a"))
    assert not lock_of(run, "a").try_acquire()
    assert still_held(run, taken.token)
    taken.release()
    mine = lock_of(run, "b")
    assert mine.try_acquire()
    assert still_held(run, mine.token)
    mine.release()
    abandoned(run)
    assert not lock_of(run, "c").try_acquire()  # it may live, somewhere else
    dead = subprocess.Popen(["true"])
    holder = replace(this_process({}), pid=dead.pid, born="1")
    dead.wait()
    run.lock.write_bytes(holder.record())
    mine = lock_of(run, "d")
    assert mine.try_acquire()
    mine.release()
    assert list(run.logs.iterdir()) == []


def test_another_job_is_refused_and_told_who_holds_it(run) -> None:
    lock = take(lock_of(run, "first-job"))
    with pytest.raises(JobError, match=r"held by another run: process .* on .*, job first-job, since 20") as caught:
        take(lock_of(run, "second-job"))
    assert caught.value.code == ExitCode.CANNOT_CREATE
    assert still_held(run, lock.token)
    lock.release()


def test_without_a_job_id_every_start_is_a_job_of_its_own(run) -> None:
    one, two = this_process({}), this_process({"SFT_JOB_ID": " "})
    assert one.job == one.start != two.job == two.start


@pytest.mark.parametrize("job", ["old", "new"])
def test_a_holder_elsewhere_that_is_still_is_taken_over_from(run, job) -> None:
    """By either job, after the still time; what its clock or the file's time say does not matter."""
    abandoned(run, since="2099-01-01T00:00:00+00:00", beat=3)
    for day in (-86400, 86400):
        os.utime(run.lock, (time.time() + day,) * 2)
    told: list[str] = []
    began = time.monotonic()
    lock = take(lock_of(run, job), told)
    assert time.monotonic() - began >= STILL
    assert "was still for 0.6 s and is taken over from: process" in told[-1]
    assert still_held(run, lock.token)
    lock.release()
    assert list(run.logs.iterdir()) == []


def test_the_same_job_waits_for_a_living_holder(run) -> None:
    """The old node's process may live on: its requeued job waits, and begins when it has left."""
    old = take(lock_of(run, "a"))
    threading.Timer(3 * STILL, old.release).start()
    began = time.monotonic()
    new = take(lock_of(run, "a"))
    assert time.monotonic() - began >= 3 * STILL - BEAT
    new.release()


def test_waiting_ends_at_a_stop_signal(run) -> None:
    old = take(lock_of(run, "a"))
    with pytest.raises(JobError) as caught:
        lock_of(run, "a").acquire(stopped=lambda: True, tell=lambda text: None)
    assert caught.value.code == ExitCode.STOPPED
    old.release()


def test_a_dead_process_of_this_host_is_taken_over_from_at_once(run) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    record = replace(this_process({"SFT_JOB_ID": "x"}), pid=dead.pid, born="1").record()
    run.lock.write_bytes(record)
    began = time.monotonic()
    take(lock_of(run, "a")).release()
    assert time.monotonic() - began < STILL / 2
    # A pid that is another process's by now is no sign of life either.
    run.lock.write_bytes(replace(this_process({"SFT_JOB_ID": "x"}), born="1").record())
    take(lock_of(run, "a")).release()


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1}', b"\xff\xfe", b"[1]", b"null"])
def test_a_lock_that_cannot_be_read_is_still_too(run, content) -> None:
    run.lock.write_bytes(content)
    take(lock_of(run, "a")).release()


def test_a_holder_that_lost_the_lock_knows_and_leaves_it_alone(run) -> None:
    """Fencing: whoever took over keeps the lock, the old holder's beats never overwrite it."""
    frozen = take(lock_of(run, "a"))
    thief = this_process({"SFT_JOB_ID": "b"})
    temporary = run.logs / "new"
    temporary.write_bytes(thief.record())
    temporary.replace(run.lock)
    time.sleep(6 * BEAT)
    assert "job b" in frozen.lost_to
    assert not still_held(run, frozen.token)
    frozen.release()
    assert json.loads(run.lock.read_text())["start"] == thief.start


def test_a_lock_removed_by_hand_is_made_again(run) -> None:
    lock = take(lock_of(run, "a"))
    run.lock.unlink()
    assert still_held(run, lock.token)
    assert lock.lost_to == ""
    lock.release()
    assert not still_held(run, lock.token, missing_seconds=0.1)


def _hold(root: Path, held, left) -> None:
    lock = take(lock_of(RunFolder(root), "a"))
    held.set()
    left.wait()
    lock.release()


def test_a_frozen_process_is_taken_over_from_and_finds_out(run) -> None:
    """Two real processes; the first is stopped like a paused machine, and goes on later."""
    context = multiprocessing.get_context("spawn")
    held, left = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(run.root, held, left))
    process.start()
    try:
        assert held.wait(20)
        old = json.loads(run.lock.read_text())["start"]
        os.kill(process.pid or 0, signal.SIGSTOP)
        lock = take(lock_of(run, "b"))  # another job: refused while it beats, not when it is still
        os.kill(process.pid or 0, signal.SIGCONT)
        left.set()
        process.join(20)
        assert process.exitcode == 0
        assert still_held(run, lock.token)
        assert not still_held(run, old)
        lock.release()
    finally:
        process.kill()


def test_of_many_that_wait_one_gets_it(run) -> None:
    """All see the same still holder and take over at the same moment."""
    abandoned(run)
    locks = [lock_of(run, "a") for _ in range(8)]
    holding, most = [], []

    def compete(lock: RunLock) -> None:
        take(lock)
        holding.append(lock)
        most.append(len(holding))
        time.sleep(0.05)
        assert still_held(run, lock.token)
        holding.remove(lock)
        lock.release()

    threads = [threading.Thread(target=compete, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 8


def test_without_hard_links(run, monkeypatch) -> None:
    def refused(*args: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refused)
    lock = take(lock_of(run, "a"))
    assert still_held(run, lock.token)
    with pytest.raises(JobError, match="held by another run"):
        take(lock_of(run, "b"))
    lock.release()


def test_an_unwritable_folder(run) -> None:
    run.lock.mkdir()
    with pytest.raises(JobError, match="cannot be written") as caught:
        take(lock_of(run, "a"))
    assert caught.value.code == ExitCode.CANNOT_CREATE


def test_a_late_take_over_puts_the_new_holders_lock_back(run) -> None:
    """Two see the same still holder; the slower one moves away what by then is the faster one's lock."""
    old = abandoned(run)
    faster, slower = take(lock_of(run, "a")), lock_of(run, "a")
    slower._take_over(old.record(), pytest.fail, "was still")
    assert still_held(run, faster.token, missing_seconds=0)
    time.sleep(4 * BEAT)
    assert faster.lost_to == ""
    faster.release()
    assert list(run.logs.iterdir()) == []
