from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from sft_job import ranks as ranks_room
from sft_job import watchdog as watchdog_room
from sft_job.config.secrets import SecretMask
from sft_job.config.topology import Topology
from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.errors import JobError
from sft_job.oversight import Listener, oversee
from sft_job.processes import state
from sft_job.ranks import RankEnd, RankGroup, last_lines, listen, verdict
from sft_job.watchdog import Watchdog


def end(rank: int, code: ExitCode, **report) -> RankEnd:
    return RankEnd(rank, code, "", report)


def test_a_stated_cause_explains_the_ranks_that_lost_their_peer() -> None:
    ends = [end(0, ExitCode.LOST, message="lost another rank"), end(1, ExitCode.NON_FINITE, message="nan")]
    assert verdict(ends).rank == 1


def test_a_killed_rank_explains_losses_and_odd_errors() -> None:
    noticed = end(0, ExitCode.LOST, message="lost another rank")
    confused = end(1, ExitCode.BUG, message="RuntimeError")
    killed = end(2, ExitCode.LOST)
    assert verdict([noticed, confused, killed]).rank == 2


def test_a_bug_explains_losses() -> None:
    assert verdict([end(0, ExitCode.LOST, message="lost"), end(1, ExitCode.BUG, message="boom")]).code == ExitCode.BUG


def test_stopped_and_done() -> None:
    assert verdict([end(0, ExitCode.DONE), end(1, ExitCode.STOPPED)]).code == ExitCode.STOPPED
    assert verdict([end(0, ExitCode.DONE), end(1, ExitCode.DONE)]).code == ExitCode.DONE


def test_a_stuck_rank_explains_losses_but_not_a_bug() -> None:
    noticed = end(0, ExitCode.LOST, message="lost another rank")
    stuck = RankEnd(1, ExitCode.LOST, "no progress", {}, stuck=True)
    assert verdict([noticed, stuck]).rank == 1
    assert verdict([end(0, ExitCode.BUG), stuck]).rank == 0


def test_last_lines_are_this_starts_and_plain(tmp_path) -> None:
    log = tmp_path / "rank_0.log"
    log.write_bytes(b"an earlier start\n")
    before = log.stat().st_size
    lines = [b"\x1b[1mline\x1b[0m %d\x07\tx\xff" % number for number in range(40)]
    with log.open("ab") as file:
        file.write(b"\r\n".join([*lines, b"", b"  "]))
    found = last_lines(log, before)
    assert found == tuple(f"line {number}  x\N{REPLACEMENT CHARACTER}" for number in range(25, 40))
    log.write_bytes(b"y" * 100_000)
    assert [len(line) for line in last_lines(log, 0)] == [300]
    assert last_lines(log, log.stat().st_size) == ()
    assert last_lines(tmp_path / "none", 0) == ()


def test_no_part_of_a_secret_is_in_last_lines(tmp_path) -> None:
    """Neither where a line is cut nor where the log is."""
    log, value = tmp_path / "rank_0.log", "canary" + "0123456789" * 40
    mask = SecretMask({"A_TOKEN": value})
    log.write_text(f"{'x' * 200}{value}\n{'y' * 16000}")
    shown = "".join(last_lines(log, 0, mask))
    assert "canary" not in shown
    assert "0123456789" not in shown
    log.write_text(f"{value}{'y' * 16200}")
    assert set("".join(last_lines(log, 0, mask))) <= set("<secret A_TOKEN>y")


def test_the_meeting_place() -> None:
    """On one node nobody from outside can connect, and a port that was chosen cannot be taken before its use."""
    one, two = Topology(2, 1, 0, "", None), Topology(2, 2, 0, "host", None)
    with listen(one) as socket:
        host, port = socket.getsockname()[:2]
        assert host == "127.0.0.1"
        with pytest.raises(JobError, match=f"MASTER_PORT = {port}: the ranks cannot meet there: Address") as caught:
            listen(Topology(2, 1, 0, "", port))
        assert caught.value.code == ExitCode.LOST
    with listen(two) as socket:
        assert socket.getsockname()[0] in ("::", "0.0.0.0")


RANK = """
import faulthandler, os, signal, sys, time
faulthandler.register(signal.SIGQUIT, all_threads=True, chain=False)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGQUIT])
from pathlib import Path
from sft_job.pulse import TRAINING, Pulse, pulse_file
rank = int(os.environ["RANK"])
pulse = Pulse(pulse_file(Path(os.environ["SFT_JOB_REPORT_DIR"]), rank))
pulse.enter(TRAINING)
pulse.beat(step=7)
if rank == 0:
    pulse.beat()
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("frozen", [True, False])
def test_stuck_ranks(tmp_path, frozen) -> None:
    """The culprit is the stopped one, else the one with the fewest signs of life; the others show their stacks."""
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = RankGroup([sys.executable, "-c", RANK], Topology(2, 1, 0, "", None), run, tmp_path, environ)
    try:
        deadline = time.monotonic() + 60
        while {rank: seen.beat.count for rank, seen in ranks.seen().items()} != {0: 3, 1: 2}:
            assert time.monotonic() < deadline
            ranks.step()
        if frozen:
            (pid,) = [pid for pid in ranks.pids if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
            os.kill(pid, signal.SIGSTOP)
            while state(pid) != "T":  # a stop takes effect when the kernel next runs the process
                assert time.monotonic() < deadline
        ranks.ask_for_stacks()
        answering = [0] if frozen else [0, 1]
        while not all("most recent call first" in run.rank_log(rank).read_text() for rank in answering):
            assert time.monotonic() < deadline
            ranks.step()
        ranks.kill_stuck(12.3)
    finally:
        ranks.kill()
    found = verdict(ranks.ends())
    assert (found.rank, found.code, found.stuck) == (1, ExitCode.LOST, True)
    assert found.message.startswith("rank 1 made no progress for 12 s while training, after step 7; ")
    assert ("its process is stopped (SIGSTOP)" in found.message) == frozen
    assert "the supervisor ends it" in run.rank_log(1).read_text()
    assert "the supervisor ends it" not in run.rank_log(0).read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.pids)


def test_a_rank_that_cannot_be_killed_is_left_behind(tmp_path, monkeypatch) -> None:
    """As in a wait for a disk that does not answer; here no signal is sent."""
    monkeypatch.setattr(ranks_room, "_KILL_SECONDS", 0.3)
    monkeypatch.setattr(watchdog_room, "_LATER_SECONDS", 0.1)
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    command = [sys.executable, "-c", "import time; time.sleep(15)"]
    ranks = RankGroup(command, Topology(1, 1, 0, "", None), run, tmp_path, dict(os.environ))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RankGroup, "_signal", lambda *_: None)
            watchdog = Watchdog(0.2, time.monotonic(), allowance=0.2)
            found = oversee(ranks, watchdog, Listener(), lambda: False, lambda _: None)
        assert (found.rank, found.code, found.stuck) == (0, ExitCode.LOST, True), found
        assert "does not end even by SIGKILL" in found.message
        assert all(Path(f"/proc/{pid}").exists() for pid in ranks.pids)
    finally:
        ranks.kill()


def test_only_rank_0_gets_the_socket(tmp_path) -> None:
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    code = f"import os, sys; sys.stderr.write(str('{Env.STORE_FD}' in os.environ)); sys.exit(65)"
    ranks = RankGroup([sys.executable, "-c", code], Topology(2, 1, 0, "", None), run, tmp_path, dict(os.environ))
    while not ranks.step():
        pass
    assert [run.rank_log(rank).read_text() for rank in (0, 1)] == ["True", "False"]
    ends = ranks.ends()
    assert [each.code for each in ends] == [ExitCode.DATA] * 2
    assert ends[1].last_lines == ("False",)  # it left no word
