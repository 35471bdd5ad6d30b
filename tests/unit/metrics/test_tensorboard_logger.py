from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sft_job.contract import RunFolder
from sft_job.metrics.loggers import BackgroundLogger, make_loggers
from sft_job.metrics.tensorboard_logger import TensorboardLogger

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard would show: name -> steps and values."""
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, round(event.value, 4)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def log(folder: Path, first: int, last: int, *, resume_step: int = 0, offset: float = 0.0) -> None:
    logger = TensorboardLogger(folder, resume_step)
    for step in range(first, last + 1):
        logger.log({"step": step, "train/loss": step + offset, "perf/mfu": None, "note": "text"})
    logger.close()


def test_numbers_only(tmp_path: Path) -> None:
    log(tmp_path / "a" / "tensorboard", 1, 3)
    assert points(tmp_path / "a" / "tensorboard") == {"train/loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}


@pytest.mark.parametrize("resume_step", [0, 2, 3])
def test_resumed_run_shows_each_step_once(tmp_path: Path, resume_step: int) -> None:
    log(tmp_path, 1, 5)  # killed after step 5; the last checkpoint is that of resume_step
    log(tmp_path, resume_step + 1, 6, resume_step=resume_step, offset=0.5)
    before = [(step, float(step)) for step in range(1, resume_step + 1)]
    after = [(step, step + 0.5) for step in range(resume_step + 1, 7)]
    assert points(tmp_path) == {"train/loss": before + after}


def test_nothing_logged_writes_nothing(tmp_path: Path) -> None:
    TensorboardLogger(tmp_path / "tensorboard").close()
    assert list(tmp_path.iterdir()) == []


def test_by_name(tmp_path: Path) -> None:
    run, warnings = RunFolder(tmp_path), []
    loggers = make_loggers(["tensorboard"], run, total_steps=2, warn=warnings.append)
    loggers.log({"step": 1, "train/loss": 1.0})
    loggers.log({"step": 1, "val/loss": 2.0})
    loggers.close()
    assert warnings == []
    assert points(run.tensorboard) == {"train/loss": [(1, 1.0)], "val/loss": [(1, 2.0)]}


def test_package_that_cannot_be_imported_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    warnings: list[str] = []
    logger = BackgroundLogger(TensorboardLogger(tmp_path), name="tensorboard", warn=warnings.append)
    for step in (1, 2):
        logger.log({"step": step, "train/loss": 1.0})
    logger.close()
    assert len(warnings) == 1
    assert "tensorboard: ModuleNotFoundError" in warnings[0]
