"""The job on real GPUs: the curve of the CPU within bf16, Ulysses and FSDP2 over two cards, equal twins."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tiny import save_model, write_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SEED_YAML = Path(__file__).parents[1] / "golden" / "seed_sft_trainer.yaml"
STEPS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", "qwen3", hidden_size=256, intermediate_size=512, head_dim=32, num_attention_heads=8)
    write_rows(folder / "train.parquet", 64)
    write_rows(folder / "val.parquet", 8, seed=1)
    return folder


def command(inputs: Path, *overrides: str) -> list[str]:
    settings = {
        "data.train_files": inputs / "train.parquet",
        "data.val_files": inputs / "val.parquet",
        "data.max_length": 256,
        "model.partial_pretrain": inputs / "model",
        "model.fsdp_config.model_dtype": "fp32",
        "optim.lr": "1e-3",
        "trainer.total_training_steps": STEPS,
        "trainer.logger": "[]",
        "ulysses_sequence_parallel_size": 1,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "sft_job.cli", "train", str(SEED_YAML), *words, *overrides]


def environment(run: Path, ranks: int = 1) -> dict[str, str]:
    return os.environ | {"NPROC_PER_NODE": str(ranks), "CHECKPOINT_DIR": str(run)}


def train(
    inputs: Path, run: Path, *overrides: str, ranks: int = 1, devices: str | None = None
) -> tuple[list[dict], dict]:
    """Losses by step and the outcome of a real run."""
    variables = environment(run, ranks)
    if devices is not None:
        variables |= {"CUDA_VISIBLE_DEVICES": devices}
    result = subprocess.run(command(inputs, *overrides), env=variables, capture_output=True, text=True, check=False)
    log = run / "sft" / "logs" / "rank_0.log"
    assert result.returncode == 0, result.stderr + (log.read_text() if log.exists() else "")
    lines = [json.loads(line) for line in (run / "sft" / "logs" / "metrics.jsonl").read_text().splitlines()]
    # Shown with -s.
    sys.stdout.write(f"{overrides} {ranks} ranks, peak {peak(lines):.3f} GiB: {[round(x, 3) for x in losses(lines)]}\n")
    return lines, json.loads((run / "sft" / "logs" / "outcome.json").read_text())


def losses(lines: list[dict]) -> list[float]:
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def on_cpu(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(train(inputs, tmp_path_factory.mktemp("cpu"), devices="")[0])


def assert_close(found: list[float], expected: list[float]) -> None:
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=0.02)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_one_gpu_follows_the_cpu(inputs, tmp_path, on_cpu) -> None:
    lines, _ = train(inputs, tmp_path / "gpu")
    assert_close(losses(lines), on_cpu)
    assert lines[-2]["memory/peak_gib"] > 0
    assert 0 < lines[-2]["perf/mfu"] < 1


def test_one_gpu_in_fp32_is_closer(inputs, tmp_path, on_cpu) -> None:
    found = losses(train(inputs, tmp_path / "gpu", "model.fsdp_config.dtype=fp32")[0])
    assert found == pytest.approx(on_cpu, rel=1e-3)


def test_bf16_weights(inputs, tmp_path, on_cpu) -> None:
    found = losses(train(inputs, tmp_path / "gpu", "model.fsdp_config.model_dtype=bf16")[0])
    assert found[0] == pytest.approx(on_cpu[0], rel=0.01)
    assert sum(found[-3:]) < 0.95 * sum(found[:3])


def test_deterministic_twins(inputs, tmp_path) -> None:
    twins = [train(inputs, tmp_path / name, "trainer.deterministic=true")[1] for name in ("one", "two")]
    assert twins[0]["weights_sha256"] == twins[1]["weights_sha256"]


def test_deterministic_run_that_was_killed(inputs, tmp_path) -> None:
    """SIGKILL to every process of the run, in the middle; started again it ends with the bits of its twin."""
    settings = ["trainer.deterministic=true", "trainer.save_freq=4"]
    whole = train(inputs, tmp_path / "whole", *settings)[1]
    run = tmp_path / "run"
    mark = f"CHECKPOINT_DIR={run}".encode()
    with subprocess.Popen(command(inputs, *settings), env=environment(run), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and logged_steps(run) < 10:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdecimal() and mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)
    assert logged_steps(run) < STEPS
    lines, outcome = train(inputs, run, *settings)
    assert outcome["restarts"][0]["cause"] == "lost"
    assert outcome["weights_sha256"] == whole["weights_sha256"]
    assert len(losses(lines)) == STEPS


def logged_steps(run: Path) -> int:
    metrics = run / "sft" / "logs" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.multigpu
@two_gpus
@pytest.mark.parametrize("ulysses", [1, 2])
def test_two_gpus_follow_the_cpu(inputs, tmp_path, on_cpu, ulysses) -> None:
    lines, _ = train(inputs, tmp_path / "gpu", f"ulysses_sequence_parallel_size={ulysses}", ranks=2)
    assert_close(losses(lines), on_cpu)


@pytest.mark.multigpu
@two_gpus
def test_two_gpus_go_on_as_one(inputs, tmp_path) -> None:
    constant = "optim.lr_scheduler=constant"
    straight = losses(train(inputs, tmp_path / "straight", constant)[0])
    run = tmp_path / "run"
    train(inputs, run, "trainer.total_training_steps=10", constant, ranks=2)
    lines, _ = train(inputs, run, constant, ranks=1)
    assert_close(losses(lines), straight)


LORA = ("model.lora_rank=8", "model.fsdp_config.model_dtype=bf16", "optim.lr=5e-3")


def peak(lines: list[dict]) -> float:
    return max(line.get("memory/peak_gib") or 0.0 for line in lines)


def assert_falls(lines: list[dict]) -> None:
    found = losses(lines)
    assert len(found) == STEPS
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_lora(inputs, tmp_path) -> None:
    lines, _ = train(inputs, tmp_path / "gpu", *LORA)
    assert_falls(lines)
    full, _ = train(inputs, tmp_path / "full", "model.fsdp_config.model_dtype=bf16")
    assert peak(lines) < peak(full)


def test_offload(inputs, tmp_path, on_cpu) -> None:
    lines, _ = train(inputs, tmp_path / "gpu", "model.fsdp_config.cpu_offload=true")
    assert_close(losses(lines), on_cpu)
    kept, _ = train(inputs, tmp_path / "kept")
    assert peak(lines) < peak(kept)


@pytest.mark.multigpu
@two_gpus
@pytest.mark.parametrize("more", [
    ["model.fsdp_config.fsdp_size=1"],
    ["model.fsdp_config.cpu_offload=true", "ulysses_sequence_parallel_size=2"],
])  # fmt: skip
def test_two_gpus_hsdp_and_offload(inputs, tmp_path, on_cpu, more) -> None:
    assert_close(losses(train(inputs, tmp_path / "gpu", *more, ranks=2)[0]), on_cpu)


@pytest.mark.multigpu
@two_gpus
def test_two_gpus_lora(inputs, tmp_path) -> None:
    alone = losses(train(inputs, tmp_path / "one", *LORA)[0])
    lines, _ = train(inputs, tmp_path / "two", *LORA, "ulysses_sequence_parallel_size=2", ranks=2)
    assert_falls(lines)
    assert losses(lines) == pytest.approx(alone, rel=0.05)
