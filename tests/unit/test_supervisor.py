from __future__ import annotations

import time

import pytest

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.supervisor import deadline_of


def config(max_wall_seconds: int | None) -> JobConfig:
    job = JobConfig()
    job.trainer.max_wall_seconds = max_wall_seconds
    return job


def test_no_deadline() -> None:
    assert deadline_of(config(None), {}, 5.0) is None
    assert deadline_of(config(None), {"SFT_JOB_END_TIME": " "}, 5.0) is None


def test_the_earlier_of_the_two() -> None:
    now = time.monotonic()
    assert deadline_of(config(60), {}, now) == now + 60
    soon, late = ({"SFT_JOB_END_TIME": str(time.time() + seconds)} for seconds in (30, 300))
    assert deadline_of(config(60), soon, now) == pytest.approx(now + 30, abs=5)
    assert deadline_of(config(None), soon, now) == pytest.approx(now + 30, abs=5)
    assert deadline_of(config(60), late, now) == now + 60


@pytest.mark.parametrize("value", ["tomorrow", "nan", "inf", "12:30"])
def test_an_end_time_that_is_none(value) -> None:
    with pytest.raises(JobError, match=r"SFT_JOB_END_TIME = .*\n    must be a Unix time") as caught:
        deadline_of(config(None), {"SFT_JOB_END_TIME": value}, 0.0)
    assert caught.value.code == ExitCode.CONFIG
