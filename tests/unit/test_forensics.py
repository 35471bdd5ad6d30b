"""What is kept of a step that was not finite."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sft_job.contract import RunFolder
from sft_job.data.batches import StepBatch
from sft_job.data.cache import TokenRow
from sft_job.forensics import BadSteps


def rows(count: int) -> Any:
    ids, trained = np.array([5, 6, 7], dtype=np.int32), np.array([True, False, True])
    return SimpleNamespace(origin=lambda i: (Path("a.parquet"), i + 10), row=lambda i: TokenRow(ids + i, trained))


def note(folder: Path, count: int = 2, writes: bool = True) -> Any:
    batch = StepBatch(4, 0, np.arange(count), [], 2 * count, 3 * count)
    return BadSteps(RunFolder(folder), rows(count), lambda ids: f"text {ids}", writes).note(batch, float("nan"), 1.5)


def test_evidence_is_whole_and_for_the_owner_alone(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/bad_step_5.json").write_text("of an earlier start, for all to read")
    bad = note(tmp_path)
    assert bad.evidence == tmp_path / "logs/bad_step_5.json"
    assert stat.S_IMODE(bad.evidence.stat().st_mode) == 0o600
    record = json.loads(bad.evidence.read_text())
    assert (record["step"], record["loss"], record["grad_norm"]) == (5, "nan", 1.5)
    assert record["rows"][1] == {"row": "a.parquet, row 11", "tokens": 3, "trained_tokens": 1, "text": "text [6, 7, 8]"}


def test_the_log_names_rows_and_never_their_text(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    text = note(tmp_path, 20).text()
    assert "step 5: loss nan, gradient norm 1.5" in text
    assert "a.parquet, row 17" in text
    assert "row 18" not in text
    assert "20 in all" in text
    assert "text [" not in text


def test_other_ranks_and_a_full_disk_leave_no_evidence(tmp_path: Path):
    assert note(tmp_path).evidence is None
    (tmp_path / "logs").mkdir()
    assert note(tmp_path, writes=False).evidence is None
    assert not list((tmp_path / "logs").iterdir())
