from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sft_job import supervisor as room
from sft_job.checkpoint.start import Start
from sft_job.config.schema import JobConfig
from sft_job.config.topology import Topology
from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError
from sft_job.opening import deadline_of, make_logs
from sft_job.supervisor import Supervisor


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


@pytest.fixture
def start_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A supervisor's start on this process's own signals and children."""
    resolution: Any = SimpleNamespace(
        loaded=SimpleNamespace(config=JobConfig()), topology=Topology(1, 1, 0, "", None), warnings=[], problems=[]
    )
    monkeypatch.setattr(room, "adopt_orphans", lambda: None)
    monkeypatch.setattr(room, "examined", lambda *_: resolution)
    monkeypatch.setattr(room, "run_folder", lambda _: RunFolder(tmp_path))
    monkeypatch.setattr(room.Listener, "install", lambda self: self)
    monkeypatch.setattr(Supervisor, "_tell", lambda *_: None)
    return lambda: Supervisor(Console(file=io.StringIO()), {}).train(None, [])


def test_where_a_run_begins_is_decided_under_the_lock(tmp_path, monkeypatch, start_once) -> None:
    """Another start of this job may save and leave in the minutes in which checkpoints are read."""
    run, held = RunFolder(tmp_path), []

    def look(*_: Any) -> Start:
        held.append(run.lock.exists())
        return Start(finished=True)

    monkeypatch.setattr(room, "fetch_remote", look)
    monkeypatch.setattr(room, "find_start", look)
    assert start_once() == ExitCode.DONE
    assert held == [True, True]
    assert list(run.logs.iterdir()) == []


def test_nodes_that_start_together_try_the_folder_without_harm(tmp_path) -> None:
    run = RunFolder(tmp_path / "run")
    with ThreadPoolExecutor(8) as nodes:
        for _ in nodes.map(lambda _: make_logs(run), range(200)):
            pass
    assert list(run.logs.iterdir()) == []
