from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from sft_job.lock import _born, this_process
from sft_job.status.life import look


class Clock:
    """Time that passes in ``sleep`` alone; something may happen after some of it."""

    def __init__(self, happens_at: float = 1e9, event=lambda: None) -> None:
        self.now, self.happens_at, self.event = 0.0, happens_at, event

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.happens_at:
            self.happens_at = 1e9
            self.event()


def elsewhere(run, beat: int = 5):
    holder = replace(this_process({"SFT_JOB_ID": "old"}), host="node7", place="elsewhere", beat=beat)
    run.lock.write_bytes(holder.record())
    return holder


def seen(run, clock: Clock):
    return look(run, 8, sleep=clock.sleep, clock=clock)


def test_nobody_holds_it(run) -> None:
    assert seen(run, Clock()).holder is None


def test_a_process_of_this_host_needs_no_watching(run) -> None:
    run.lock.write_bytes(this_process({}).record())
    clock = Clock()
    assert seen(run, clock).alive
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run.lock.write_bytes(replace(this_process({}), pid=child.pid, born=_born(child.pid)).record())
    assert seen(run, clock).alive
    child.communicate()
    life = seen(run, clock)
    assert (life.alive, life.gone, clock.now) == (False, True, 0.0)


def test_elsewhere_a_beat_is_a_sign_of_life_and_ends_the_watching(run) -> None:
    holder = elsewhere(run)
    clock = Clock(2.9, lambda: run.lock.write_bytes(replace(holder, beat=6).record()))
    life = seen(run, clock)
    assert life.alive
    assert clock.now < 3.5


def test_elsewhere_and_still(run) -> None:
    elsewhere(run)
    life = seen(run, Clock())
    assert (life.alive, life.gone, life.watched) == (False, False, 8.0)


def test_given_back_while_watched(run) -> None:
    elsewhere(run)
    assert seen(run, Clock(1, run.lock.unlink)).holder is None
