from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.ceiling import matmul_ceiling
from benchmarks.plan import runs_of
from benchmarks.rows import rows_named
from benchmarks.shapes import write_model_folder
from benchmarks.throughput import Bench, run_sitting, state_of
from benchmarks.trl_attention import packed_attention
from benchmarks.trl_side import drawn_model

ROOT = Path(__file__).parents[3]


def test_the_job_is_measured_by_the_real_command(tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks.throughput", "--shape", "tiny", "--device", "cpu", "--steps", "2"]
    command += ["--warmup", "1", "--no-partners", "--no-reference", "--ours", "optim.lr=1.0e-3"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "throughput.json").read_text())
    run = record["runs"][0]
    assert [(each["part"], each["state"]) for each in record["runs"]] == [("A", "done")]
    found = run["figures"]
    assert found["steps"] == 2
    assert len(found["losses"]) == len(found["grad_norms"]) == 3
    assert found["tokens_of_step"] == 256
    assert (found["padding"], found["token_imbalance"]) == (0.0, 0.0)
    assert found["config"]["optim.lr"] == 1e-3
    assert any("training rows" in line for line in run["said"])
    assert record["ceiling_tflops"] > 0
    assert record["warm_ceiling_tflops"] > 0
    assert "partner" not in record["verdicts"][0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "throughput.json",
        "throughput.md",
        "throughput.log",
    }
    assert "| qwen7b_full_2x8192 | A | ours | 2 |" in (tmp_path / "out" / "throughput.md").read_text()


def bench(tmp_path: Path, seconds: float) -> Bench:
    (tmp_path / "out").mkdir()
    record = {"runs": [], "machine": {"gpu": None, "versions": {}, "commit": "abc"}, "started": "now"}
    return Bench(tmp_path / "work", tmp_path / "out", on_gpu=False, deadline=time.monotonic() + seconds, record=record)


def test_without_time_a_run_is_not_begun_but_noted(tmp_path) -> None:
    limited, row = bench(tmp_path, 10), rows_named(["qwen7b_full_2x8192"])[0].tiny()
    run_sitting(limited, [row], runs_of([row], 2, 1, partners=True, reference=False), 4)
    limited.write([row])
    assert {run["state"] for run in limited.record["runs"]} == {"not begun: no time left"}
    assert len(json.loads((tmp_path / "out" / "throughput.json").read_text())["runs"]) == 4


@pytest.mark.parametrize(
    ("code", "text", "state"),
    [
        (0, "all went well", "done"),
        (None, "step 3", "cut off by the time limit"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory"),
        (1, "ImportError", "failed with 1"),
    ],
)
def test_how_a_run_ended(code: int | None, text: str, state: str) -> None:
    assert state_of(code, text) == state


def test_the_peers_attention_keeps_documents_apart() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    borders = torch.tensor([0, 4, 11], dtype=torch.int32)
    out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, scaling=0.3, cu_seq_lens_q=borders, max_length_q=7)
    document = torch.tensor([0] * 4 + [1] * 7)
    allowed = (document[:, None] == document[None, :]) & torch.ones(11, 11, dtype=torch.bool).tril()
    whole = F.scaled_dot_product_attention(q, k, v, allowed, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, whole.transpose(1, 2))


def test_the_peers_weights_are_drawn_whole_and_each_time_the_same(tmp_path) -> None:
    folder = str(write_model_folder(tmp_path / "tiny", "tiny"))
    first, second = (drawn_model(folder, "sdpa", torch.device("cpu"), torch.float32) for _ in range(2))
    assert all(not parameter.is_meta for parameter in first.parameters())
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    projections = [parameter for name, parameter in first.named_parameters() if name.endswith("proj.weight")]
    assert all(0.01 < parameter.std().item() < 0.03 for parameter in projections)
    assert not torch.equal(projections[0], projections[len(projections) // 2])
    logits = first(torch.arange(8)[None]).logits
    assert logits.isfinite().all()


def test_the_ceiling_is_measured_without_touching_random_numbers() -> None:
    torch.manual_seed(7)
    found = matmul_ceiling(torch.device("cpu"))
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    for rates in (found, found["warm"]):
        assert 0 < rates["p10"] <= rates["tflops"] <= rates["p90"]
