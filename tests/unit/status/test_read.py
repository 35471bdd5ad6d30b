from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from sft_job.contract import ExitCode, RunFolder
from sft_job.lock import this_process
from sft_job.outcome import note_refusal
from sft_job.status.life import Life
from sft_job.status.read import RunStatus, read_status
from sft_job.submissions import Submission, note_judgement, note_requeue
from tests.unit.status.conftest import write_ends, write_metrics

HOLDER = this_process({"SFT_JOB_ID": "17"})
ALIVE, GONE, STILL = Life(HOLDER, alive=True), Life(HOLDER, gone=True), Life(HOLDER, watched=8.0)
FREE = Life()


@pytest.mark.parametrize(
    ("code", "life", "state"),
    [
        (None, ALIVE, "running"),
        (143, ALIVE, "running"),  # a new start that has not come to its outcome
        (None, STILL, "silent"),
        (None, GONE, "lost"),
        (None, FREE, "lost"),
        (0, FREE, "done"),
        (143, FREE, "stopped"),
        (137, FREE, "lost"),
        (2, FREE, "failed"),
        (1, GONE, "failed"),
    ],
)
def test_the_state(run, code: int | None, life: Life, state: str) -> None:
    write_ends(run, code, "running" if code is None else ExitCode(code).reason, message="m")
    status = read_status(run, life)
    assert (status.state, status.code, status.message) == (state, code, "m")
    assert (status.holder is None) == (life.holder is None)


def test_a_run_that_goes_on(run, checkpoint) -> None:
    write_ends(run, None, "running", step=4, restarts=[{"cause": "lost", "step": 2}], restarts_omitted=3)
    write_metrics(run, 6)
    with run.metrics.open("a") as file:
        file.write('{"step": 7, "train/lo')  # being written
    folder = checkpoint(4)
    run.config.write_text("trainer:\n  total_training_steps: null\n  total_epochs: 3\n")
    status = read_status(run, ALIVE)
    assert (status.step, status.total_steps, status.epoch) == (6, 12, 1.5)
    assert (status.loss, status.learning_rate) == (pytest.approx(2.4), 1e-5)
    assert (status.validation_loss, status.validation_step) == (2.5, 4)
    assert (status.tokens, status.tokens_per_second_per_gpu, status.ranks) == (600, 1500.0, 2)
    assert status.seconds_left == 12.0
    assert status.checkpoint is not None
    assert (status.checkpoint.folder, status.checkpoint.step, status.checkpoint.fault) == (str(folder), 4, "")
    assert status.restarts == ({"cause": "lost", "step": 2},)
    assert status.restarts_omitted == 3
    json.dumps(dataclasses.asdict(status))


@pytest.mark.parametrize(
    ("config", "with_checkpoint", "total"),
    [
        ("trainer: {total_training_steps: 40, total_epochs: 3}", True, 40),
        ("trainer: {total_training_steps: null, total_epochs: 5}", True, 20),
        ("trainer: {total_training_steps: '${oc.env:STEPS}', total_epochs: 5}", False, 20),
        ("trainer: 3", True, 12),
        ("\x00", False, None),
        (None, True, 12),
    ],
)
def test_total_steps(run, checkpoint, config: str | None, with_checkpoint: bool, total: int | None) -> None:
    write_metrics(run, 6)
    if config is not None:
        run.config.write_text(config)
    if with_checkpoint:
        checkpoint(4)
    assert read_status(run, FREE).total_steps == total


def test_a_checkpoint_that_cannot_be_used_says_why(run, checkpoint) -> None:
    assert read_status(run, FREE).checkpoint is None
    weights = checkpoint(2, contents=("model",))
    assert "holds model only" in checkpoint_fault(run)
    whole = checkpoint(4)
    assert checkpoint_fault(run) == ""
    (whole / "shard").write_bytes(b"1" * 100)  # the size stays
    assert checkpoint_fault(run) == ""
    assert "content has changed" in checkpoint_fault(run, verify=True)
    (whole / "shard").write_bytes(b"1")
    assert "1 bytes instead of 100" in checkpoint_fault(run)
    assert weights.is_dir()


def checkpoint_fault(run: RunFolder, *, verify: bool = False) -> str:
    found = read_status(run, FREE, verify=verify).checkpoint
    assert found is not None
    assert found.verified == verify
    return found.fault


def test_a_refused_start_is_the_newest_end_until_the_next_start(run) -> None:
    write_ends(run, 143, "stopped")
    note_refusal(run, ExitCode.CONFIG, "optim.lr differs hf_abcdefghijklmnopqrstuvwxyz", {})
    status = read_status(run, FREE)
    assert (status.state, status.code) == ("failed", 143)
    assert status.refusal is not None
    assert (status.refusal["code"], status.refusal["message"]) == (2, "optim.lr differs <secret>")
    write_ends(run, 0, "done")
    assert read_status(run, FREE).refusal is None


def test_a_refusal_that_cannot_be_kept_is_no_error(run) -> None:
    run.logs.rmdir()
    note_refusal(run, ExitCode.CONFIG, "no", {})
    assert not run.logs.exists()
    run.logs.write_text("")
    note_refusal(run, ExitCode.CONFIG, "no", {})
    assert read_status(run, FREE).refusal is None


def test_a_job_that_waits(run) -> None:
    write_ends(run, 143, "stopped")
    note_requeue(run, "slurm", "17")
    status = read_status(run, FREE)
    assert status.state == "waiting"
    assert status.requeue is not None
    assert status.requeue.job == "17"
    assert read_status(run, ALIVE).requeue is None
    note_refusal(run, ExitCode.CONFIG, "no", {})
    assert read_status(run, FREE).state == "failed"
    note_refusal(run, ExitCode.LOST, "the store is away", {})
    assert read_status(run, FREE).state == "waiting"


def test_what_the_launcher_made_of_an_end(run) -> None:
    write_ends(run, 143, "stopped")
    assert read_status(run, FREE).judgement is None
    note_judgement(run, "slurm", "17", 2, "retries\x1b[2J allow 1: not queued again\n    fix: y", {"timeout": 2})
    found = read_status(run, FREE).judgement
    assert found is not None
    assert (str(found), found.counts) == ("slurm job 17, start 2", {"timeout": 2})
    assert found.why == "retries[2J allow 1: not queued again\n    fix: y"


def test_a_job_without_a_run_folder_shows_what_it_said(tmp_path) -> None:
    old, new = tmp_path / "7_0.err", tmp_path / "7_1.err"
    old.write_text("old\n")
    os.utime(old, (1, 1))
    new.write_text("noise\n1 problem:\nfirst\n2 problems:\n\x1b[31mdata.train_files\n    must be set\n\n")
    submission = Submission("slurm", "7", str(tmp_path / "sft"), (f"{tmp_path}/7_*.err", f"{tmp_path}/none"))
    status = read_status(RunFolder(tmp_path / "sft"), FREE, submission)
    assert status.state == "absent"
    assert status.last_words == ("2 problems:", "[31mdata.train_files", "    must be set")
    assert status.launcher_logs == (str(old), str(new))
    new.write_text("".join(f"line {number}\n" for number in range(100)))
    assert read_status(RunFolder(tmp_path / "sft"), FREE, submission).last_words[0] == "line 80"


def test_a_job_that_found_the_folder_held_by_another_one(run, tmp_path) -> None:
    (tmp_path / "18_0.err").write_text("the run folder is held by another run\n")
    write_ends(run, None, "running")
    mine, other = (Submission("slurm", job, str(run.root), (f"{tmp_path}/{job}_*.err",)) for job in ("17", "18"))
    assert read_status(run, ALIVE, mine).held_by == ""
    assert read_status(run, ALIVE).held_by == ""
    assert read_status(run, GONE, other).held_by == ""
    found = read_status(run, ALIVE, other)
    assert (found.held_by, found.last_words) == ("17", ("the run folder is held by another run",))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "\x00\xff", '{"code": 0}', '{"reason": 1, "step": {}, "restarts": [3], "code": "x"}']
)
def test_remnants_are_read_as_far_as_they_go(run, checkpoint, content: str) -> None:
    folder = checkpoint(4)
    for path in (run.outcome, run.starts, run.metrics, run.config, run.refusal, run.requeued):
        path.write_text(content)
    for path in (folder / "state.json", folder / "manifest.json"):
        path.write_text(content)
    status = read_status(run, FREE)
    assert isinstance(status, RunStatus)
    assert status.checkpoint is not None
    assert status.checkpoint.fault


def test_nothing_is_written(run, checkpoint) -> None:
    checkpoint(4)
    write_ends(run, None, "running")

    def tree() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}

    before = tree()
    read_status(run, FREE, verify=True)
    assert tree() == before
