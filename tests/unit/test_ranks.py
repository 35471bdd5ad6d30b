from __future__ import annotations

from sft_job.contract import ExitCode
from sft_job.ranks import RankEnd, verdict


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
