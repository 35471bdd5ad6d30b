"""The benchmarks run and write what they promise; how fast they are is not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_data_pipeline(tmp_path: Path) -> None:
    out, work = tmp_path / "results" / "data.json", tmp_path / "work"
    work.mkdir()
    options = ["--rows", "2000", "--repeats", "1", "--work", str(work), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "benchmarks/data_pipeline.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(work.iterdir()), "temporary files are left"

    record = json.loads(out.read_text(encoding="utf-8"))
    settings, results = record["settings"], record["results"]
    assert {"cpu", "cores", "torch", "tokenizers", "commit"} <= record["machine"].keys()
    (cold,) = results["cold"]
    assert cold["rows"] == settings["rows"] == 2000
    assert 250 < cold["tokens"] / cold["rows"] < 350
    assert len(results["tokenizers_threads"]) == len(results["tokenizers_processes"]) == 2
    assert results["rank_large"]["steps"] == results["rank_small"]["steps"] == settings["steps"]
    assert results["rank_small"]["rows"] == settings["small_rows"]
    long = results["long_rows"]["cold"]
    assert long["tokens"] == long["rows"] * settings["long_row_tokens"] == long["rows"] * long["longest_row"]
    assert results["many_files"]["files"]["files"] == settings["small_files"]
    assert results["many_files"]["cold"]["rows"] == settings["small_files"] * settings["small_file_rows"]
    assert all(result["seconds"] > 0 for result in [*results["warm"], *results["warm_from_disk"]])

    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {line['name']} | {line['value']} |" in table for line in record["table"])


def test_checkpoint_save(tmp_path: Path) -> None:
    out, work = tmp_path / "save.json", tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "benchmarks/checkpoint_save.py", "--folder", str(work), "--step-seconds=0.01", f"--out={out}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(work.iterdir()), "temporary files are left"
    beside, waiting = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert (beside["asynchronous"], waiting["asynchronous"]) == (True, False)
    assert beside["said"] == waiting["said"] == []
    for (save,) in (beside["saves"], waiting["saves"]):
        assert save["gib"] > 0.04
        assert save["total_seconds"] > 0
    assert beside["saves"][0]["save_call_seconds"] < beside["saves"][0]["total_seconds"]


def test_the_seed_s_own_run(tmp_path: Path) -> None:
    """Eight ranks as the seed's YAML says, Ulysses 4 x 2, and two with Ulysses 2: the same losses."""
    out = tmp_path / "results"
    options = ["--config", str(ROOT / "tests" / "golden" / "seed_sft_trainer.yaml"), "--tiny", "--ranks", "8"]
    options += ["--steps", "2", "--cases", "seed,two", "--work", str(tmp_path / "work"), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.seed_run", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr + (out / "seed.log").read_text(encoding="utf-8")
    cases = json.loads((out / "seed_run.json").read_text(encoding="utf-8"))["cases"]
    assert [(case["ranks"], case["exit_codes"], len(case["metrics"])) for case in cases.values()] == [
        (8, [0], 2),
        (2, [0], 2),
    ]
    assert 0 <= cases["two"]["difference"] < 1e-5
