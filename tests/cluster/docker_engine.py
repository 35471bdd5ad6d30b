"""A real Docker engine for tests, the image built by it, and containers of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.slurm_cluster import REPOSITORY, SEED_YAML, run_overrides

TORCH = "2.13.0"
BASE_IMAGE = f"localhost/debian-torch:{TORCH}"
USER = "12345:0"
CANARY = "c0ffee" * 6
"""Value of the secret that every run here is given."""
HARD = (
    "--read-only",
    "--network=none",
    f"--user={USER}",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--shm-size=64m",
)
"""What a container is run with at the hardest place."""


class NoEngineError(Exception):
    """No engine can be started here; the text is the reason."""


class Engine:
    """A private Docker engine, with a base image that has Python and torch."""

    def __init__(self) -> None:
        tools = Path(os.environ.get("SFT_JOB_TEST_TOOLS") or REPOSITORY.parent / "shared" / "tools")
        up, self._down = tools / "container-up", tools / "container-down"
        if not up.is_file():
            raise NoEngineError(f"there is no {up}; SFT_JOB_TEST_TOOLS names its folder")
        if os.geteuid() != 0:
            raise NoEngineError("it needs root")
        state = Path(os.environ.get("CONTAINER_STATE") or _state_home() / "container-engine")
        self._was_up = (state / "docker.sock").exists()
        done = subprocess.run([str(up), "--torch", TORCH], capture_output=True, text=True, check=False, timeout=600)
        if done.returncode != 0:
            raise NoEngineError(f"container-up: {done.stderr.strip().splitlines()[-1:]}")
        exports = dict(re.findall(r"^export (DOCKER_\w+)=(\S+)$", (state / "env").read_text(), re.MULTILINE))
        self.environ = {**os.environ, **exports, "PATH": f"{state}/bin:{os.environ['PATH']}"}
        self.environ.pop("DOCKER_CONTEXT", None)

    def close(self) -> None:
        """End it, unless it was up before; its images stay for the next time."""
        if not self._was_up:
            subprocess.run([str(self._down)], capture_output=True, check=False, timeout=120)

    def __call__(self, *words: str) -> str:
        """Standard output of a command of the client."""
        done = subprocess.run(
            ["docker", *words], env=self.environ, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{words[:3]}: {done.stderr}"
        return done.stdout.strip()

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """``docker run``, waited for."""
        return subprocess.run(
            ["docker", "run", *words],
            env=self.environ | environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def build(self, name: str, pip_conf: Path) -> None:
        """The image, by the command that people use."""
        variables = {"BASE_IMAGE": BASE_IMAGE, "FLASH_ATTENTION": "none", "NETWORK": "host", "PIP_CONF": str(pip_conf)}
        words = [f"{variable}={value}" for variable, value in {**variables, "IMAGE": name}.items()]
        done = subprocess.run(
            ["make", "image", *words],
            cwd=REPOSITORY,
            env=self.environ | {"BUILD_CANARY": CANARY},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        assert CANARY not in done.stdout + done.stderr

    def layers(self, image: str) -> list[Path]:
        """Folders of this machine with the files of each of the image's layers, the newest first."""
        data = json.loads(self("image", "inspect", "--format", "{{json .GraphDriver.Data}}", image))
        return [Path(data["UpperDir"]), *map(Path, data["LowerDir"].split(":"))]


def _state_home() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")


@dataclass
class DockerRun:
    """One run folder, and the containers that write into it.

    Attributes:
        engine: where.
        image: of the job.
        inputs: model and rows.
        root: its ``CHECKPOINT_DIR`` on this machine.
        names: of all containers, to be removed.
    """

    engine: Engine
    image: str
    inputs: Path
    root: Path
    names: list[str] = field(default_factory=list[str])

    @property
    def run(self) -> Path:
        return self.root / "sft"

    def make_root(self) -> None:
        self.root.mkdir(parents=True)
        os.chown(self.root, *map(int, USER.split(":")))

    def words(self, out: str | None = None) -> list[str]:
        """``docker run`` as the README has it, with the seed's variables, at the hardest place."""
        return [
            *HARD,
            f"--volume={self.inputs}:/inputs:ro",
            f"--volume={out or self.root}:/out",
            "--env=PYTHONPATH=/inputs/code",
            "--env=CONFIG_PATH=/inputs",
            f"--env=CONFIG_NAME={SEED_YAML.name}",
            "--env=CHECKPOINT_DIR=/out",
            "--env=NPROC_PER_NODE=2",
            "--env=OMP_NUM_THREADS=1",
            "--env=TEST_PACE",
            "--env=TEST_LEDGER=/out",
            "--env=WANDB_API_KEY",
            self.image,
            "train",
            *pace_overrides(Path("/inputs")),
        ]

    def train(self, out: str | None = None) -> subprocess.CompletedProcess[str]:
        """To its end."""
        return self.engine.run("--rm", *self.words(out), WANDB_API_KEY=CANARY, TEST_PACE="0")

    def start(self, pace: float) -> str:
        """In the background; the container's name."""
        done = self.engine.run("--detach", *self.words(), WANDB_API_KEY=CANARY, TEST_PACE=str(pace))
        assert done.returncode == 0, done.stderr
        self.names.append(done.stdout.strip())
        return self.names[-1]

    def wait_step(self, step: int, name: str) -> None:
        deadline = time.monotonic() + 120
        while self.step() < step:
            state = self.engine("inspect", "--format", "{{.State.Status}}", name)
            assert state == "running", self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.1)

    def stop(self, name: str) -> int:
        self.engine("stop", "--time=60", name)
        return self.exit_code(name)

    def exit_code(self, name: str) -> int:
        return int(self.engine("wait", name))

    def log(self, name: str) -> str:
        done = subprocess.run(
            ["docker", "logs", name], env=self.engine.environ, capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    def step(self) -> int:
        try:
            lines = (self.run / "logs" / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines), default=0)
        except (OSError, ValueError):
            return 0

    def outcome(self) -> Mapping[str, object]:
        return json.loads((self.run / "logs" / "outcome.json").read_text())

    def remove(self) -> None:
        for name in self.names:
            self.engine("rm", "--force", "--volumes", name)
        shutil.rmtree(self.root, ignore_errors=True)


def pace_overrides(inputs: Path, secret: bool = True) -> list[str]:
    """Settings of every run here; one of them may hold the secret."""
    known = [each for each in run_overrides(inputs) if not each.startswith("model.external_lib=")]
    return [*known, "model.external_lib=pace", *["trainer.experiment_name=${oc.env:WANDB_API_KEY}"] * secret]


def files_with(text: str, *folders: Path) -> list[str]:
    """Files below folders that hold a text, packed ones as they are."""
    done = subprocess.run(
        ["grep", "-rlaF", "--", text, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


Make = Callable[..., DockerRun]
