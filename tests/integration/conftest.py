from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.tiny import save_model, write_rows

SEED_YAML = Path(__file__).parents[1] / "golden" / "seed_sft_trainer.yaml"


@dataclass
class Job:
    """The real command on real files, in a process of its own."""

    inputs: Path
    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.root / "ckpt" / "sft"

    def command(self, *overrides: str, verb: str = "train") -> list[str]:
        small = [
            f"data.train_files={self.inputs}/train.parquet",
            f"data.val_files={self.inputs}/val.parquet",
            f"model.partial_pretrain={self.inputs}/qwen3",
            "data.max_length=256",
            "model.fsdp_config.model_dtype=fp32",
            "ulysses_sequence_parallel_size=1",
            "trainer.logger=[console]",
        ]
        return [sys.executable, "-m", "sft_job.cli", verb, str(SEED_YAML), *small, *overrides]

    def variables(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "NPROC", "CONFIG_", "CHECKPOINT"))}
        own = {"CHECKPOINT_DIR": str(self.root / "ckpt"), "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
        return kept | own | self.environment | more

    def start(self, *overrides: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*overrides),
            env=self.variables(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *overrides: str, verb: str = "train", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*overrides, verb=verb),
            env=self.variables(**more),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "qwen3", "qwen3")
    write_rows(folder / "train.parquet", 13)
    write_rows(folder / "val.parquet", 5, seed=1)
    return folder


@pytest.fixture
def job(inputs: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    return Job(inputs, tmp_path)


def end(process: subprocess.Popen[str]) -> None:
    """Leave nothing behind, whatever a test did."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
