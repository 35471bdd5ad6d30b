from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_job.checkpoint.folder import publish, temporary_folder
from sft_job.checkpoint.state import RunState
from sft_job.contract import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "ckpt" / "sft")
    folder.logs.mkdir(parents=True)
    return folder


def write_ends(run: RunFolder, code: int | None, reason: str, **more: Any) -> None:
    record = {"code": code, "reason": reason, "message": "", "step": 0, "loss": None, "restarts": [], **more}
    run.outcome.write_text(json.dumps(record))


def write_metrics(run: RunFolder, steps: int, per_epoch: int = 4) -> None:
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": step / per_epoch, "train/loss": 3 - step / 10, "train/lr": 1e-5}
        line |= {"perf/step_seconds": 2.0, "perf/tokens_per_second_per_gpu": 1500.0, "train/tokens": 100 * step}
        lines.append(line)
        if step % per_epoch == 0:
            lines.append({"step": step, "val/loss": 2.5})
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def checkpoint(run: RunFolder) -> Callable[..., Path]:
    def make(step: int, contents: tuple[str, ...] = ("model", "optimizer"), world: int = 2) -> Path:
        state = RunState(
            step=step,
            total_steps=12,
            steps_per_epoch=4,
            epoch=0,
            rows_done=0,
            tokens=0,
            supervised_tokens=0,
            loss=1.25,
            world=world,
            ulysses=1,
            data="",
            model="",
            config={},
            kept=True,
            version="0",
            contents=contents,
        )
        folder = temporary_folder(run, step, "t")
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(state.to_json())
        (folder / "shard").write_bytes(b"0" * 100)
        return publish(run, step, folder)

    return make
