from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fp8_demo import BF16, RUNS, SHAPES, TOLERANCE, compared

ROOT = Path(__file__).parents[3]
FALLING = [6.0, 4.0, 2.0, 1.0, 1.0, 1.0]


def test_windows_are_compared_and_the_mean_loss_is_told() -> None:
    found = compared([6.06, 3.96, 2.0, 1.02, 0.98, 1.03], FALLING, 3)
    assert found["distances"] == pytest.approx([0.02 / 3, 0.07 / 3])
    assert found["mean_loss"] == pytest.approx(0.01)
    assert found["same"] is True


def test_another_training_is_not_the_same() -> None:
    assert compared([each * (1 + 2 * TOLERANCE) for each in FALLING], FALLING, 3)["same"] is False
    assert compared([FALLING[0]] * 6, FALLING, 3)["same"] is False


def test_rounding_allows_as_much_as_it_does_itself_and_in_its_window_alone() -> None:
    rounded = [*FALLING[:3], 1.2, 0.8, 1.2]
    near, far = [*FALLING[:3], 0.78, 1.22, 0.78], [*FALLING[:3], 0.7, 1.3, 0.7]
    early = [6.0 * 1.2, 4.0 * 0.8, 2.0 * 1.2, 1.0, 1.0, 1.0]
    assert compared(near, FALLING, 3)["same"] is False
    assert compared(near, FALLING, 3, rounded)["same"] is True
    assert compared(far, FALLING, 3, rounded)["same"] is False
    assert compared(early, FALLING, 3, rounded)["same"] is False
    assert compared(near, FALLING, 3, rounded[:2])["same"] is False


def test_a_run_that_broke_off_and_a_model_that_learned_nothing_prove_nothing() -> None:
    assert compared(FALLING[:4], FALLING, 3)["same"] is None
    assert compared([], FALLING, 3)["same"] is None
    assert compared([6.0, 5.9, 5.9, 5.9], [6.0, 5.9, 5.9, 5.9], 2)["same"] is None


def test_sizes_are_what_fp8_takes() -> None:
    model = SHAPES["real"].model
    assert all(model[name] % 16 == 0 for name in ("hidden_size", "intermediate_size", "head_dim"))
    assert SHAPES["real"].rows >= SHAPES["real"].batch * (SHAPES["real"].steps + 1)


def test_the_real_command_on_a_cpu(tmp_path) -> None:
    """bf16's runs come to their end; fp8's are refused there, and the table says why."""
    command = [sys.executable, "-m", "benchmarks.fp8_demo", "--shape", "tiny", "--device", "cpu"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "fp8_demo.json").read_text())
    assert list(record["runs"]) == list(RUNS)
    plain, other, tensorwise, rowwise = record["runs"].values()
    assert plain["losses"] == other["losses"]
    assert len(plain["losses"]) == 4
    assert plain["losses"][-1] < plain["losses"][0]
    for run in (tensorwise, rowwise):
        assert "needs a GPU with fp8 units" in run["state"]
    table = (tmp_path / "fp8_demo.md").read_text()
    assert f"| {BF16} | 4 |" in table
    assert "| fp8 rowwise | - | - | - | model.fp8 = 'rowwise': needs a GPU" in table
    assert f"| 4 | {plain['losses'][3]:.4f} |" in table
