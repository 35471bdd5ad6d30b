"""A step that cannot be taken, a batch that does not fit, and a rehearsal that leaves no trace."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from tests.distributed.runs import Watched, join_ranks, run_job, seed_config, watch_steps


def config_of(inputs: Path, run: Path, *overrides: str) -> Any:
    return seed_config(
        inputs / "qwen3",
        inputs / "train.parquet",
        None,
        run,
        "ulysses_sequence_parallel_size=1",
        "data.train_batch_size=4",
        "data.micro_batch_size_per_gpu=2",
        "optim.lr=1e-2",
        "model.fsdp_config.model_dtype=fp32",
        "trainer.total_epochs=1",
        *overrides,
    )


def run_spoilt(config: Any, spoil: str, forward: int, full_disk: bool = False) -> tuple[Watched, str, int]:
    """Train where the given forward (from 1) gives NaN on the last rank, or runs out of memory on every rank.

    With ``full_disk`` metrics.jsonl takes no line.

    What was seen, the message of the run's end, its exit code.
    """
    from sft_job.checkpoint.start import find_start
    from sft_job.config.load import run_folder
    from sft_job.job import build_job
    from sft_job.runtime import StopWish

    runtime, stop, watched, seen = join_ranks(), StopWish(), Watched(), [0]
    job = build_job(config, runtime, stop, find_start(config, run_folder(config)))
    watch_steps(job, watched, stop, None, False)

    def after(module: Any, inputs: Any, output: torch.Tensor) -> Any:
        seen[0] += 1
        if seen[0] == forward and spoil == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved ...")
        return output * float("nan") if seen[0] == forward and runtime.rank == runtime.world - 1 else None

    job.module.register_forward_hook(after)
    if full_disk and job.loggers is not None:
        job.loggers._jsonl._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 (the logger closes it)
    try:
        with job:
            ending = job.run()
    except JobError as error:
        return watched, str(error), int(error.code)
    watched.weights_sha256 = ending.state.weights_sha256
    return watched, "", 0


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_rehearsal_leaves_no_trace(inputs: Path, tmp_path: Path, ranks):
    both = []
    for rehearsal in ("true", "false"):
        config = config_of(inputs, tmp_path / rehearsal, f"trainer.rehearsal={rehearsal}", "trainer.total_epochs=2")
        both.append(ranks(2, run_job, config)[0])
    assert both[0].weights_sha256 == both[1].weights_sha256
    assert both[0].losses == both[1].losses
    assert both[0].rows == both[1].rows


def test_a_step_that_is_not_finite_ends_the_run_and_leaves_evidence(inputs: Path, tmp_path: Path, ranks):
    config = config_of(
        inputs, tmp_path / "run", "trainer.save_freq=1", "trainer.rehearsal=false", "trainer.async_save=false"
    )
    watched, message, code = ranks(2, run_spoilt, config, "nan", 2)[0]
    assert code == ExitCode.NON_FINITE
    assert len(watched.losses) == 1
    assert "step 2: loss nan" in message
    assert "global_step_1" in message
    evidence = tmp_path / "run/logs/bad_step_2.json"
    assert str(evidence) in message
    assert stat.S_IMODE(evidence.stat().st_mode) == 0o600
    record = json.loads(evidence.read_text())
    assert len(record["rows"]) == 4
    assert all(row["text"] and row["row"] in message for row in record["rows"])
    # Of the rows' text nothing is told.
    assert not any(row["text"] in message for row in record["rows"])


@pytest.mark.parametrize(("forward", "code"), [(3, ExitCode.NON_FINITE), (0, ExitCode.CANNOT_CREATE)])
def test_metrics_that_cannot_be_written_hide_no_earlier_error(inputs: Path, tmp_path: Path, ranks, forward, code):
    """They are an end of their own only where the run itself has gone well."""
    config = config_of(inputs, tmp_path / "run", "trainer.rehearsal=false")
    _, message, found = ranks(1, run_spoilt, config, "nan", forward, True)[0]
    assert found == code, message
    assert ("metrics.jsonl: cannot be written" in message) == (code == ExitCode.CANNOT_CREATE)


def test_a_step_that_is_not_finite_is_skipped_up_to_a_cap(inputs: Path, tmp_path: Path, ranks):
    skip = ["trainer.non_finite=skip", "trainer.rehearsal=false", "optim.lr_scheduler=constant"]
    config = config_of(inputs, tmp_path / "run", *skip)
    watched, message, code = ranks(2, run_spoilt, config, "nan", 2)[0]
    assert (code, message) == (0, "")
    assert len(watched.losses) == 4
    logged = lines(tmp_path / "run")
    assert [line["train/loss"] is None for line in logged] == [False, True, False, False]
    assert [line.get("train/skipped_steps") for line in logged] == [None, 1, 1, 1]
    state = json.loads((tmp_path / "run/checkpoints/final/state.json").read_text())
    assert state["skipped_steps"] == 1
    assert state["loss"] == watched.losses[-1]
    assert watched.losses[2] < watched.losses[0]


@pytest.mark.parametrize("rehearsal", [True, False])
def test_out_of_memory_says_where_and_what_to_change(inputs: Path, tmp_path: Path, ranks, rehearsal: bool):
    config = config_of(inputs, tmp_path / "run", f"trainer.rehearsal={str(rehearsal).lower()}")
    _, message, code = ranks(2, run_spoilt, config, "memory", 1)[1]
    assert code == ExitCode.OUT_OF_MEMORY
    place = "in the rehearsal of the longest batch, before step 1 on rank 1" if rehearsal else "at step 1 on rank 1"
    assert f"out of device memory {place}: a micro-batch of" in message
    for part in ("Tried to allocate 2.00 GiB", "weights", "optimizer states", "micro_batch_size_per_gpu below 2"):
        assert part in message
