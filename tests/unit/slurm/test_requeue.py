from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.contract import ExitCode
from slurm.requeue import (
    Asked,
    Cause,
    Restart,
    Verdict,
    code_of,
    joint_code,
    judge,
    read_restarts,
    with_unseen,
    write_restarts,
)

NOBODY, WARNED, ENDED, BOTH = Asked(), Asked(warned_at=100.0), Asked(stopped_at=100.0), Asked(100.0, 120.0)
LIMIT, LIMIT_AND_END = Asked(100.0, None, limit=True), Asked(100.0, 120.0, limit=True)


def verdict(
    code: int,
    asked: Asked,
    *,
    over: bool = False,
    preempted: bool = False,
    step: int | None = 8,
    restarts: tuple[Restart, ...] = (),
) -> Verdict:
    limits = {"timeout": 4, "preemption": 1, "loss": 0 if restarts else 3}
    return judge(code, asked, over=over, preempted=preempted, step=step, restarts=restarts, retries=limits)


@pytest.mark.parametrize(
    ("code", "asked", "over", "cause"),
    [
        (0, NOBODY, False, None),
        (0, LIMIT, True, None),
        (143, WARNED, False, Cause.PREEMPTION),
        (143, LIMIT, False, Cause.TIMEOUT),
        (143, NOBODY, False, Cause.TIMEOUT),  # the job's own deadline: steps may be longer than its grace
        (143, ENDED, False, None),
        (143, BOTH, False, None),
        (143, LIMIT_AND_END, False, None),
        (143, LIMIT_AND_END, True, Cause.TIMEOUT),  # the save took longer than the grace: TERM is the limit's own
        (137, LIMIT_AND_END, True, Cause.LOSS),
        (137, NOBODY, False, Cause.LOSS),
        (137, WARNED, False, Cause.LOSS),
        (137, ENDED, False, None),
        (2, WARNED, False, None),
        (86, NOBODY, False, None),
        (1, NOBODY, False, None),
        (127, NOBODY, False, None),
    ],
)
def test_what_becomes_of_a_job(code: int, asked: Asked, over: bool, cause: Cause | None) -> None:
    found = verdict(code, asked, over=over)
    assert (found.code, found.cause) == (code, cause)


@pytest.mark.parametrize(("code", "cause"), [(143, Cause.PREEMPTION), (137, Cause.LOSS), (0, None), (2, None)])
def test_a_preemption_without_a_warning(code: int, cause: Cause | None) -> None:
    """Slurm queues a preempted job again at the end of its grace, and only where it still runs then."""
    assert verdict(code, ENDED, preempted=True).cause == cause


def test_causes_are_counted_apart() -> None:
    earlier = (Restart(0, "timeout", 143, 4), Restart(1, "preemption", 143, 6), Restart(2, "scheduler", None))
    assert verdict(143, LIMIT, restarts=earlier).cause == Cause.TIMEOUT
    refused = verdict(143, WARNED, restarts=earlier)
    assert refused.cause is None
    assert refused.why == "preemption number 2, and retries allow 1: not queued again"
    assert verdict(137, NOBODY, restarts=earlier).cause is None


def timeouts(*steps: int | None) -> tuple[Restart, ...]:
    return tuple(Restart(at, "timeout", 143, step) for at, step in enumerate(steps))


@pytest.mark.parametrize(
    ("restarts", "step", "code"),
    [
        (timeouts(8, 8), 8, 86),
        (timeouts(None, None), None, 86),
        (timeouts(4, 8, 8), 8, 86),
        (timeouts(8), 8, 143),
        (timeouts(8, 8), 9, 143),
        (timeouts(7, 8), 8, 143),
        ((*timeouts(8), Restart(1, "preemption", 143, 8)), 8, 143),
    ],
)
def test_time_limits_that_are_too_short_end_it(restarts: tuple[Restart, ...], step: int | None, code: int) -> None:
    found = verdict(143, LIMIT, step=step, restarts=restarts)
    assert (found.code, found.cause is None) == (code, code == 86)


def mixed(*causes: str, step: int | None = 8) -> tuple[Restart, ...]:
    return tuple(Restart(at, cause, 143, None if cause == "scheduler" else step) for at, cause in enumerate(causes))


def after(restarts: tuple[Restart, ...], asked: Asked, code: int = 143, step: int | None = 8) -> Verdict:
    return judge(code, asked, over=False, preempted=False, step=step, restarts=restarts, retries={}, fruitless=6)


def test_time_limits_in_vain_count_over_what_lies_between() -> None:
    """Stops by turns are as endless as stops of one kind."""
    assert after(mixed("timeout", "preemption", "timeout"), WARNED).cause == Cause.PREEMPTION
    assert after(mixed("timeout", "preemption", "timeout", "scheduler"), LIMIT).code == ExitCode.NO_PROGRESS
    assert after(mixed("timeout", "preemption", "timeout"), LIMIT, step=9).cause == Cause.TIMEOUT


@pytest.mark.parametrize("step", [8, None])
def test_starts_without_a_new_checkpoint_end_it(step: int | None) -> None:
    earlier = mixed("preemption", "loss", "preemption", "scheduler", step=step)
    assert after(earlier, WARNED, step=step).cause == Cause.PREEMPTION
    found = after((*earlier, Restart(4, "loss", 137, step)), WARNED, step=step)
    assert (found.code, found.cause) == (86, None)
    assert found.why.startswith("6 starts in a row ended without a new checkpoint (loss 2, preemption 3, scheduler 1)")
    assert after((*earlier, Restart(4, "loss", 137, step)), WARNED, step=9).cause == Cause.PREEMPTION


def test_what_slurm_did_before_the_newest_checkpoint_is_not_in_vain() -> None:
    earlier = (*mixed("preemption", step=4), *mixed("scheduler", "scheduler", "scheduler", "scheduler", "preemption"))
    assert after(earlier, WARNED).cause == Cause.PREEMPTION


@pytest.mark.parametrize(
    ("returned", "asked", "code"),
    [
        (0, NOBODY, 0),
        (2, WARNED, 2),
        (143, NOBODY, 143),
        (137, NOBODY, 137),
        (-signal.SIGKILL, WARNED, 137),
        (-signal.SIGTERM, NOBODY, 137),
        (-signal.SIGTERM, ENDED, 143),
        (-signal.SIGUSR2, WARNED, 143),
        (128 + signal.SIGUSR2, WARNED, 143),
        (128 + signal.SIGUSR2, NOBODY, 137),
        (128 + signal.SIGSEGV, NOBODY, 137),
        (-signal.SIGSEGV, ENDED, 137),
        (126, NOBODY, 126),
    ],
)
def test_codes_of_processes(returned: int, asked: Asked, code: int) -> None:
    assert code_of(returned, asked) == code


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({0: 0, 1: 0}, 0),
        ({0: 0, 1: 143}, 0),
        ({0: 2, 1: 137}, 2),
        ({0: 137, 1: 88}, 88),
        ({0: 143, 1: 65, 2: 2}, 65),
        ({0: 143, 1: 137}, 137),
        ({0: 143, 1: 143}, 143),
        ({0: 143, 1: 0}, 143),
        ({0: 137}, 137),
        ({1: 143}, 143),
        ({}, 137),
    ],
)
def test_one_code_for_all_nodes(ends: dict[int, int], code: int) -> None:
    assert joint_code(ends) == code


@given(st.lists(st.sampled_from([Restart(0, "timeout", 143), Restart(0, "loss", 137)]), max_size=5), st.integers(0, 8))
def test_restarts_that_nobody_asked_for(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[Restart], now: int
) -> None:
    known = tuple(Restart(at * 2, each.cause, each.code, at) for at, each in enumerate(kinds))
    path = tmp_path_factory.getbasetemp() / "restarts.json"
    write_restarts(path, known)
    found = with_unseen(read_restarts(path), now)
    assert [each.start for each in found] == list(range(now))
    assert all(each in known or each.cause == Cause.SCHEDULER for each in found)
    assert {each for each in known if each.start < now} <= set(found)


def test_a_damaged_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    assert read_restarts(path) == ()
    for text in ("", "[]", '{"restarts": [{}]}', '{"restarts": 3}'):
        path.write_text(text)
        assert read_restarts(path) == ()


def test_only_what_launchers_retry_is_queued_again() -> None:
    retried = {code for code in ExitCode if verdict(int(code), WARNED).cause is not None}
    assert retried == {ExitCode.LOST, ExitCode.STOPPED}
