"""A real Slurm for tests, and jobs on it, submitted by the real command and struck from outside."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from sft_job.demo.run import RECIPE, DemoFolder, make_input

REPOSITORY = Path(__file__).parents[2]
SEED_YAML = REPOSITORY / "tests" / "golden" / "seed_sft_trainer.yaml"
DEMO_YAML = RECIPE
GROUPS = 3
GROUP_NODES = 3
GRACE = 20
PACE = "0.15"
STEPS = 44


class NoClusterError(Exception):
    """No Slurm can be started here; the text is the reason."""


class Cluster:
    """A private Slurm: nodes ``n1`` ..., partitions ``batch`` (preempted) and ``urgent``.

    Args:
        state: folder of the cluster, a short path: sockets lie below it. One that is up there is joined.
    """

    def __init__(self, state: Path) -> None:
        tools = Path(os.environ.get("SFT_JOB_TEST_TOOLS") or REPOSITORY.parent / "shared" / "tools")
        self._up, self._down = tools / "slurm-up", tools / "slurm-down"
        if not self._up.is_file():
            raise NoClusterError(f"there is no {self._up}; SFT_JOB_TEST_TOOLS names its folder")
        self.state = state
        self.environ = dict(os.environ)
        self.repair()

    def repair(self) -> None:
        """Bring up what is not up: all of it at first, dead nodes later."""
        options = ["--nodes", str(GROUPS * GROUP_NODES), "--cpus", "4", "--gpus", "2", "--state", str(self.state)]
        up = subprocess.run([str(self._up), *options], capture_output=True, text=True, check=False, timeout=240)
        if up.returncode != 0:
            raise NoClusterError(f"slurm-up: {up.stderr.strip().splitlines()[-1:]}")
        self.environ |= dict(re.findall(r"^export (\w+)='(.*)'$", up.stdout, re.MULTILINE))

    def close(self) -> None:
        subprocess.run([str(self._down), "--state", str(self.state)], capture_output=True, check=False, timeout=60)
        shutil.rmtree(self.state, ignore_errors=True)

    def ask(self, *command: str) -> str:
        """Standard output of one of Slurm's commands."""
        return subprocess.run(
            command, env=self.environ, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    def state_of(self, job_id: str) -> str:
        """Of the job's present start: PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.field(job_id, "JobState")

    def field(self, job_id: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", self.ask("scontrol", "show", "job", "--oneliner", job_id))
        return found[1] if found else ""

    def crash(self, node: str) -> None:
        """Power failure of a node."""
        subprocess.run(["kill", "-9", self._pid(node)], check=True)

    def cut(self, node: str) -> None:
        """Its network cable is pulled."""
        subprocess.run(["ip", "link", "set", self._link(node), "down"], check=True)

    def mend(self, node: str) -> None:
        subprocess.run(["ip", "link", "set", self._link(node), "up"], check=True)

    def _pid(self, node: str) -> str:
        return (self.state / "run" / f"{node}.pid").read_text().split()[0]

    def _link(self, node: str) -> str:
        bridge = (self.state / "bridge").read_text().strip()
        return f"sl{bridge.removeprefix('slurm')}-{node}"


@dataclass
class SlurmRun:
    """One job file, and the jobs made of it.

    Attributes:
        cluster: where.
        inputs: model and rows.
        root: folder of this run.
        nodes: that it may use.
        settings: of the job file, on top of the usual ones.
        overrides: of the run.
        environment: of the command that submits.
        config: the run's YAML.
        base: settings of the run below ``overrides``; None = those of every run.
    """

    cluster: Cluster
    inputs: Path
    root: Path
    nodes: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    job_id: str = ""
    config: Path = SEED_YAML
    base: list[str] | None = None

    @property
    def run(self) -> Path:
        return self.root / "sft"

    def command(self, *arguments: str, node_count: int = 2, ranks: int = 1) -> list[str]:
        others = {f"n{number}" for number in range(1, GROUPS * GROUP_NODES + 1)} - set(self.nodes)
        slurm = {"exclude": ",".join(sorted(others)), "python": sys.executable}
        job = {
            "name": self.root.name,
            "config": str(self.config),
            "checkpoint_dir": str(self.root),
            "overrides": [*(run_overrides(self.inputs) if self.base is None else self.base), *self.overrides],
            "resources": {"nodes": node_count, "gpus_per_node": 0, "ranks_per_node": ranks, "time": 10},
            "grace_seconds": GRACE,
            "environment": {"TEST_PACE": PACE},
        }
        given = {name: dict(each) if isinstance(each, dict) else each for name, each in self.settings.items()}
        slurm |= given.pop("slurm", {})
        job["resources"] |= given.pop("resources", {})
        job |= {**given, "slurm": slurm}
        job["environment"] = {"TEST_LEDGER": str(self.root), **job["environment"]}
        self.root.mkdir(exist_ok=True, parents=True)
        path = self.root / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return [sys.executable, "-m", "sft_job.cli", "submit", "slurm", str(path), *arguments]

    def environ(self) -> dict[str, str]:
        kept = {k: v for k, v in self.cluster.environ.items() if not k.startswith(("PET_", "NPROC", "CONFIG_"))}
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [kept.get("PYTHONPATH")])])
        return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "XDG_STATE_HOME": str(self.root)} | self.environment

    def submit(self, *arguments: str, **shape: int) -> str:
        done = subprocess.run(
            self.command(*arguments, **shape), env=self.environ(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = re.search(r"submitted job (\d+)", done.stdout)
        assert found, done.stdout
        assert f"log: {self.root}/slurm/{found[1]}_0_log.out" in done.stdout
        self.job_id = found[1]
        return found[1]

    def log(self, node: int = 0) -> str:
        path = self.root / "slurm" / f"{self.job_id}_{node}_log.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, what: str, reached: Callable[[], bool], seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                queue = self.cluster.ask("squeue")
                raise AssertionError(f"{self.root.name}: not in {seconds} s: {what}\n{queue}\n{self.log()[-6000:]}")
            time.sleep(0.25)

    def wait_step(self, step: int, saved: bool = True) -> None:
        """Until the run has come so far, and has published a checkpoint."""
        latest = self.run / "checkpoints" / "latest"
        self.wait(f"step {step}", lambda: self.step() >= step and (latest.exists() or not saved))

    def wait_end(self, seconds: float = 240) -> str:
        """Until Slurm is done with the job; its last state, which it has kept for a while."""
        since: list[float] = []

        def over() -> bool:
            if self.cluster.state_of(self.job_id) not in ("COMPLETED", "FAILED", "CANCELLED"):
                since.clear()
                return False
            since.append(time.monotonic())
            return since[-1] - since[0] > 2

        self.wait("the end", over, seconds)
        return self.cluster.state_of(self.job_id)

    def starts(self) -> int:
        """How often Slurm queued it again."""
        return int(self.cluster.field(self.job_id, "Restarts"))

    def status(self) -> str:
        """What ``sft-job status JOBID`` shows."""
        command = [sys.executable, "-m", "sft_job.cli", "status", self.job_id]
        return subprocess.run(command, env=self.environ(), capture_output=True, text=True, check=True).stdout

    def exit_code(self) -> int:
        return int(self.cluster.field(self.job_id, "ExitCode").partition(":")[0])

    def restarts(self) -> dict[str, int]:
        """Why it was queued again, as the job has counted."""
        path = self.root / "slurm" / f"{self.job_id}_restarts.json"
        return json.loads(path.read_text())["counts"] if path.exists() else {}

    def judged_by(self, start: int) -> str:
        """Who queued the job again after a start: its task on node 0, its batch script, or Slurm by itself."""
        if f"start {start} of job {self.job_id}" in self.log() and "again already" in self.log():
            return "slurm"
        found = re.findall(
            rf"slurm: start {start} of job {self.job_id}, (.+?): .*: queued again$", self.log(), re.MULTILINE
        )
        assert len(found) <= 1, found
        return {"batch script": "script", "node 0": "task"}[found[0]] if found else "slurm"

    def ends(self) -> list[str]:
        """How each start ended, as Slurm's accounts say."""
        asked = self.cluster.ask("sacct", "--duplicates", "-X", "-n", "-P", "-o", "State", "-j", self.job_id)
        return asked.splitlines()

    def outcome(self) -> dict[str, Any]:
        return json.loads((self.run / "logs" / "outcome.json").read_text())

    def step(self) -> int:
        try:
            lines = (self.run / "logs" / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines), default=0)
        except (OSError, ValueError):
            return 0


def run_overrides(inputs: Path) -> list[str]:
    """Settings of every run: 41 rows in batches of 4, 11 steps an epoch, dropout on."""
    return [
        f"data.train_files={inputs}/train.parquet",
        f"data.val_files={inputs}/val.parquet",
        f"model.partial_pretrain={inputs}/qwen3",
        "model.external_lib=tests.cluster.pace",
        "model.fsdp_config.model_dtype=fp32",
        "data.max_length=256",
        "data.num_workers=1",
        "data.train_batch_size=4",
        "data.micro_batch_size_per_gpu=2",
        "ulysses_sequence_parallel_size=1",
        "optim.lr=1e-2",
        "trainer.logger=[]",
        f"trainer.total_epochs={STEPS // 11}",
        "trainer.save_freq=8",
        "trainer.max_ckpt_to_keep=2",
        "trainer.test_freq=-1",
        "trainer.timeout_seconds=30",
    ]


def demo_overrides(folder: Path) -> list[str]:
    """A small demo of the repository: its files are made in this folder, and its settings point there."""
    paths = DemoFolder(folder)
    make_input(paths, 512, 32, Console(file=io.StringIO()))
    return [
        f"data.train_files={paths.train}",
        f"data.val_files={paths.validation}",
        f"model.partial_pretrain={paths.base_model}",
        "model.external_lib=tests.cluster.pace",
    ]


def run_alone(root: Path, ranks: int, overrides: list[str], config: Path = SEED_YAML) -> None:
    """The same run on this machine, with nobody to disturb it."""
    command = [sys.executable, "-m", "sft_job.cli", "train", str(config), *overrides]
    root.mkdir(parents=True)
    environ = {name: each for name, each in os.environ.items() if not name.startswith(("SLURM_", "PET_"))}
    environ |= {"CHECKPOINT_DIR": str(root), "NPROC_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1"}
    environ["TEST_LEDGER"] = str(root)
    environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
