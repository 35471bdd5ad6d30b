from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sft_job.checkpoint.start import Start
from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError
from sft_job.outcome import last_outcome, restarts_so_far, write_early_outcome, write_outcome
from sft_job.ranks import RankEnd
from sft_job.starts import FailedStart, Starts, begin_start, read_starts


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    return folder


def start(run: RunFolder, step: int, end: RankEnd | None, limit: int = 3, *, all_came: bool = True) -> int:
    """One start as the supervisor makes it: 86, or the code that it ends with; None = it is killed."""
    last = last_outcome(run)
    restarts = restarts_so_far(last, Start())
    omitted = int(last.get("restarts_omitted", 0)) if last else 0
    starts = begin_start(run, step, last)
    run.starts.write_text(replace(starts, gathering=not all_came).to_json())
    write_outcome(run, None, restarts, omitted, {})
    try:
        starts.refuse(limit, run)
    except JobError as error:
        end = RankEnd(0, error.code, str(error), {})
    if end is None:
        return ExitCode.LOST
    write_outcome(run, end, restarts, omitted, {})
    return end.code


def ended(code: ExitCode, message: str = "") -> RankEnd:
    return RankEnd(0, code, message, {})


LOST, OOM = ended(ExitCode.LOST, "rank 1 was killed by SIGKILL\nmore"), ended(ExitCode.OUT_OF_MEMORY, "too long a row")


def test_three_starts_without_a_step_and_the_fourth_is_refused(run) -> None:
    assert [start(run, 5, end) for end in (LOST, None, OOM)] == [137, 137, 88]
    assert start(run, 5, LOST) == 86
    message = json.loads(run.outcome.read_text())["message"]
    assert "the last 3 starts made no new step; the run stands at step 5" in message
    causes = ["lost: rank 1 was killed by SIGKILL\n", "lost: it wrote nothing at its end\n", "memory: too long a row\n"]
    assert [message.count(cause) for cause in causes] == [1, 1, 1]
    assert str(run.starts) in message
    assert "trainer.max_starts_without_progress" in message
    assert start(run, 5, LOST) == 86
    assert [each["cause"] for each in last_outcome(run)["restarts"]] == ["lost", "lost", "out_of_memory"]


def test_ways_to_start_again(run) -> None:
    for _ in range(3):
        start(run, 0, LOST)
    assert start(run, 0, LOST) == 86
    assert start(run, 0, LOST, limit=0) == 137
    assert start(run, 0, LOST, limit=5) == 137
    assert start(run, 0, LOST, limit=5) == 86
    run.starts.unlink()
    assert start(run, 0, LOST) == 137


def test_a_new_step_begins_a_new_count(run) -> None:
    assert [start(run, step, LOST) for step in (0, 0, 0, 1, 1, 1, 2, 2, 2)] == [137] * 9
    assert start(run, 2, LOST) == 86


def test_a_step_back_is_no_progress(run) -> None:
    """The newest checkpoint turned out damaged: the run goes on from an older one."""
    assert [start(run, step, LOST) for step in (4, 2, 2)] == [137] * 3
    assert start(run, 2, LOST) == 86


@pytest.mark.parametrize(
    "end",
    [
        ended(ExitCode.STOPPED, "stopped before a new step: nothing to save"),
        ended(ExitCode.CONFIG),
        ended(ExitCode.DATA),
        ended(ExitCode.MODEL),
        ended(ExitCode.DONE),
    ],
)
def test_what_does_not_count(run, end) -> None:
    """A queue may preempt a job before its first step for as long as it likes; neither does it wipe out what counts."""
    assert [start(run, 0, end) for _ in range(9)] == [end.code] * 9
    assert [start(run, 0, each) for each in (LOST, end, LOST, end, LOST)][-1] == 137
    assert start(run, 0, LOST) == 86


def test_an_end_before_anything_was_started_counts_for_nothing_and_wipes_nothing_out(run) -> None:
    """The start before it, whose end it writes over, is counted all the same."""
    for _ in range(3):
        start(run, 0, LOST)
        for code in (ExitCode.NO_CHECKPOINT, ExitCode.CONFIG, ExitCode.NO_CHECKPOINT):
            write_early_outcome(run, code, "too early", {})
            assert last_outcome(run)["code"] == code
    assert [each["cause"] for each in last_outcome(run)["restarts"]].count("lost") == 3
    assert start(run, 0, LOST) == 86


@pytest.mark.parametrize("end", [ended(ExitCode.LOST, "node 1 did not come within 1800 s"), None])
def test_a_start_to_which_not_all_nodes_came_is_told_and_not_counted(run, end) -> None:
    for _ in range(2):
        start(run, 0, LOST)
        assert [start(run, 0, end, all_came=False) for _ in range(4)] == [137] * 4
        write_early_outcome(run, ExitCode.NO_CHECKPOINT, "too early", {})
    starts = read_starts(run.starts)
    assert starts is not None
    assert len(starts.failed) == 2
    assert {each.message for each in starts.incomplete} == {end.message if end else "it wrote nothing at its end"}
    assert len(starts.incomplete) == 8
    assert [start(run, 0, LOST) for _ in range(2)] == [137, 86]
    assert start(run, 1, LOST) == 137
    assert read_starts(run.starts) == Starts(1)


def test_a_deadline_that_is_too_short_counts(run) -> None:
    late = ended(ExitCode.STOPPED, "deadline: it came before a new step: nothing to save")
    assert [start(run, 0, late) for _ in range(3)] == [143] * 3
    assert start(run, 0, late) == 86


def test_the_lists_are_bounded(run) -> None:
    for number in range(130):
        start(run, number, LOST)
    record = last_outcome(run)
    assert len(record["restarts"]) == 100
    assert record["restarts_omitted"] == 29
    assert all(each["cause"] == "lost" for each in record["restarts"])
    many = Starts(0, tuple(FailedStart("lost", "") for _ in range(100)))
    assert len(many.then(0, {"reason": "lost", "message": ""}).failed) == 100


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x", "failed": []}', '{"step": 1, "failed": [1]}'])
def test_a_damaged_file_begins_a_new_count(run, text) -> None:
    run.starts.write_text(text)
    assert read_starts(run.starts) is None
    assert begin_start(run, 3, {"reason": "lost"}) == Starts(3)
