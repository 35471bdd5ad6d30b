"""Two nodes on this host: only the first one looks at the run folder."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from sft_job.contract import RunFolder
from sft_job.starts import read_starts
from tests.integration.conftest import Job, end
from tests.ranks import free_port

pytestmark = pytest.mark.slow


def both(job: Job, second: Job, *overrides: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each node."""
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [each.start(*overrides, **shared, NODE_RANK=str(rank)) for rank, each in enumerate((job, second))]
    try:
        texts = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            end(process)
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def test_a_start_to_which_a_node_did_not_come_is_not_counted(job) -> None:
    alone = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = job.start("trainer.total_training_steps=1", **alone)
    try:
        deadline = time.monotonic() + 60
        run = RunFolder(job.run)
        while not (starts := read_starts(run.starts)) or not starts.gathering or not run.outcome.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        end(process)
    strict = ("trainer.total_training_steps=1", "trainer.max_starts_without_progress=1", "trainer.timeout_seconds=60")
    first, second = both(job, job, *strict)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    starts = read_starts(RunFolder(job.run).starts)
    assert starts is not None
    assert (starts.failed, len(starts.incomplete), starts.gathering) == ((), 1, False)


def test_the_first_node_tells_the_other_where_the_run_begins(job) -> None:
    short = ("trainer.total_training_steps=2", "trainer.timeout_seconds=60")
    first, second = both(job, job, *short)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert (job.run / "checkpoints" / "final").exists()
    assert (job.run / "logs" / "rank_1.log").exists()

    # From here on the second one's folder is another one, which is not there.
    apart = replace(job, root=job.root / "apart")
    first, second = both(job, apart, *short)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "already done" in first[1]
    assert "already done" in second[1]

    (job.run / "checkpoints" / "final").unlink()
    (job.run / "checkpoints" / "global_step_2" / "state.json").write_text("{")
    first, second = both(job, apart, *short)
    assert (first[0], second[0]) == (74, 74), first[2] + second[2]
    assert "no checkpoint of this run is usable" in second[2]
    assert json.loads((job.run / "logs" / "outcome.json").read_text())["code"] == 74
    assert not apart.root.exists()
