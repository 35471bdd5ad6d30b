from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from sft_job import watchdog as room
from sft_job.config.topology import Topology
from sft_job.contract import ExitCode, RunFolder
from sft_job.oversight import Listener, oversee
from sft_job.pulse import SAVING, TRAINING, Beat, Pulse, pulse_file, read_beat
from sft_job.ranks import RankGroup
from sft_job.watchdog import Action, Seen, Watchdog

MIB = 2**20


def at(count: int, phase: str = TRAINING, moved: int = 0) -> Seen:
    return Seen(Beat(count, 1, phase), moved)


def actions(watchdog: Watchdog, ranks: dict[int, Seen], seconds: range) -> list[Action]:
    return [watchdog.look(second, ranks) for second in seconds]


def test_stacks_once_then_the_kill() -> None:
    watchdog = Watchdog(100, now=0)
    watchdog.look(0, {0: at(1), 1: at(1)})
    found = actions(watchdog, {0: at(1), 1: at(1)}, range(1, 106))
    assert [second for second, action in enumerate(found, 1) if action is Action.ASK_FOR_STACKS] == [80]
    assert [second for second, action in enumerate(found, 1) if action is Action.KILL] == [105]
    assert watchdog.still_for(105) == 105


def test_any_rank_that_moves_starts_it_anew() -> None:
    watchdog = Watchdog(10, now=0)
    for second in range(0, 200, 8):
        assert watchdog.look(second, {0: at(1), 1: at(second)}) is Action.NOTHING


def test_a_rank_that_ends_is_no_sign_of_life() -> None:
    watchdog = Watchdog(10, now=0)
    watchdog.look(0, {0: at(5), 1: at(5)})
    watchdog.look(9, {1: at(5)})
    assert watchdog.look(15, {1: at(5)}) is Action.KILL


def test_bytes_count_outside_training_only() -> None:
    """In training a logger's thread writes too, and would hide that the ranks are stuck."""
    busy = Watchdog(10, now=0, allowance=20)
    stuck = Watchdog(10, now=0, allowance=20)
    for second in range(0, 300, 25):
        assert busy.look(second, {0: at(1, SAVING, moved=second * MIB), 1: at(1, SAVING)}) is not Action.KILL
    stuck.look(0, {0: at(1)})
    assert stuck.look(15, {0: at(1, moved=99 * MIB)}) is Action.KILL


def test_stacks_and_lines_in_a_log_are_no_progress() -> None:
    """Healthy ranks write their stacks when asked, and rank 0 a line every half a minute."""
    watchdog = Watchdog(10, now=0, allowance=90)
    found: list[Action] = []
    moved = 0
    for second in range(200):
        moved += 200_000 if Action.ASK_FOR_STACKS in found[-1:] else 100 * (second % 30 == 0)
        found.append(watchdog.look(second, {0: at(1, SAVING, moved=moved), 1: at(1, SAVING)}))
    assert found.index(Action.ASK_FOR_STACKS) == 80
    assert found.index(Action.KILL) == 105
    assert found.count(Action.ASK_FOR_STACKS) == 1


def test_a_trickle_is_no_progress() -> None:
    """Heartbeats add up to any number of bytes; a disk at work moves much in little time."""
    watchdog = Watchdog(100, now=0, allowance=900)
    trickle = [watchdog.look(second, {0: at(1, SAVING, moved=second * MIB // 100)}) for second in range(1006)]
    assert trickle.index(Action.KILL) == 1005


def test_work_after_the_request_for_stacks_starts_it_anew() -> None:
    watchdog = Watchdog(10, now=0, allowance=90)
    watchdog.look(0, {0: at(1, SAVING)})
    assert watchdog.look(85, {0: at(1, SAVING)}) is Action.ASK_FOR_STACKS
    assert watchdog.look(90, {0: at(1, SAVING, moved=2 * MIB)}) is Action.NOTHING
    assert watchdog.look(170, {0: at(1, SAVING, moved=2 * MIB)}) is Action.ASK_FOR_STACKS
    assert watchdog.look(195, {0: at(1, SAVING, moved=2 * MIB)}) is Action.KILL


RANK = """
import faulthandler, os, signal, sys, time
faulthandler.register(signal.SIGQUIT, all_threads=True, chain=False)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGQUIT])
from pathlib import Path
from sft_job.pulse import SAVING, Pulse, pulse_file
Pulse(pulse_file(Path(os.environ["SFT_JOB_REPORT_DIR"]), int(os.environ["RANK"]))).enter(SAVING)
while True:
    time.sleep(0.3)
    sys.stderr.write("the checkpoint is still being written\\n")
"""


def test_a_frozen_rank_while_saving_is_ended(tmp_path, monkeypatch) -> None:
    """Real processes: the healthy rank answers the request for its stack and goes on to write lines."""
    monkeypatch.setattr(room, "_LATER_SECONDS", 1.0)
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = RankGroup([sys.executable, "-c", RANK], Topology(2, 1, 0, "", None), run, tmp_path, environ)
    try:
        deadline = time.monotonic() + 60
        while {seen.beat.phase for seen in ranks.seen().values()} != {SAVING}:
            assert time.monotonic() < deadline
            ranks.step()
        (pid,) = [pid for pid in ranks.pids if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
        os.kill(pid, signal.SIGSTOP)
        late = time.monotonic() + 12
        watchdog = Watchdog(1, time.monotonic(), allowance=1)
        found = oversee(ranks, watchdog, Listener(), lambda: time.monotonic() > late, lambda _: None)
    finally:
        ranks.kill()
    assert (found.rank, found.code, found.stuck) == (1, ExitCode.LOST, True), found
    assert "most recent call first" in run.rank_log(0).read_text()


def test_one_slow_rank_gives_all_of_them_time() -> None:
    watchdog = Watchdog(10, now=0, allowance=20)
    watchdog.look(0, {0: at(1, SAVING), 1: at(1)})
    assert watchdog.look(34, {0: at(1, SAVING), 1: at(1)}) is not Action.KILL
    assert watchdog.look(35, {0: at(1, SAVING), 1: at(1)}) is Action.KILL


def test_a_pulse_is_read_back(tmp_path) -> None:
    path = pulse_file(tmp_path, 3)
    assert read_beat(path) == Beat()
    pulse = Pulse(path)
    pulse.enter(TRAINING)
    pulse.beat(step=123456789012)
    with pulse.phase(SAVING):
        assert read_beat(path) == Beat(3, 123456789012, SAVING)
    assert read_beat(path) == Beat(4, 123456789012, TRAINING)
    pulse.beat()
    assert path.stat().st_size == 64
    path.write_bytes(b"\0" * 64)
    assert read_beat(path) == Beat()
    Pulse().enter(TRAINING)  # without a supervisor nobody looks
