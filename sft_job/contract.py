"""Names that users, launchers and tests rely on: exit codes, environment variables, the run folder's files."""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass
from pathlib import Path


class ExitCode(enum.IntEnum):
    """Exit codes of ``sft-job train``. Launchers retry LOST and STOPPED only."""

    DONE = 0
    BUG = 1
    CONFIG = 2
    DATA = 65
    MODEL = 66
    CANNOT_CREATE = 73
    NO_CHECKPOINT = 74
    NO_PROGRESS = 86
    NON_FINITE = 87
    OUT_OF_MEMORY = 88
    LOST = 137
    STOPPED = 143

    @property
    def reason(self) -> str:
        """The word for this code in ``outcome.json``."""
        return self.name.lower()


class Env:
    """Environment variables that the job reads. ``PET_*`` are the names that Kubeflow sets."""

    CONFIG_PATH = "CONFIG_PATH"
    CONFIG_NAME = "CONFIG_NAME"
    CHECKPOINT_DIR = "CHECKPOINT_DIR"
    NPROC_PER_NODE = "NPROC_PER_NODE"
    NNODES = "NNODES"
    NODE_RANK = "NODE_RANK"
    MASTER_ADDR = "MASTER_ADDR"
    MASTER_PORT = "MASTER_PORT"
    REPORT_DIR = "SFT_JOB_REPORT_DIR"
    """Set by the supervisor for its ranks: where a rank leaves the reason of its end."""
    LOCK = "SFT_JOB_LOCK"
    """Set by the supervisor for its ranks: its token of the run folder's lock."""
    DEADLINE = "SFT_JOB_DEADLINE"
    """Set by the supervisor for its ranks: when the run must be over, by this host's monotonic clock."""
    SUPERVISOR = "SFT_JOB_SUPERVISOR"
    """Set by the supervisor for its processes: its process id, so that they notice when it is gone."""
    STORE_FD = "SFT_JOB_STORE_FD"
    """Set by the supervisor for rank 0: the open socket on which the ranks meet."""
    JOB_ID = "SFT_JOB_ID"
    """Set by launchers: the job's id there, the same when it is queued again."""
    END_TIME = "SFT_JOB_END_TIME"
    """Set by launchers: Unix time at which the job will be ended: the scheduler's, or a little before."""
    GPUS_PER_NODE = "SFT_JOB_GPUS_PER_NODE"
    """Set by launchers that asked for GPUs: how many on each node; with fewer nothing is trained."""
    COMMIT = "SFT_JOB_COMMIT"
    """Set in the image: the commit it was built from, shown by ``--version``."""


STACK_SIGNAL = signal.SIGQUIT
"""Makes a rank write the stacks of its threads to its log, and the supervisor ask all its ranks for them."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Each of them asks the job to save and leave; USR1 and USR2 are schedulers' warnings, HUP is a lost terminal."""

DEFAULT_CONFIG_NAME = "sft_trainer.yaml"
STEP_PREFIX = "global_step_"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run's folder (``$CHECKPOINT_DIR/sft``). Only names them; creates nothing."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def latest(self) -> Path:
        """Text file that names the newest published checkpoint."""
        return self.checkpoints / "latest"

    @property
    def final(self) -> Path:
        """Link to the last checkpoint of a finished run."""
        return self.checkpoints / "final"

    def step(self, step: int) -> Path:
        return self.checkpoints / f"{STEP_PREFIX}{step}"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def config(self) -> Path:
        return self.logs / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.logs / "metrics.jsonl"

    @property
    def outcome(self) -> Path:
        return self.logs / "outcome.json"

    @property
    def refusal(self) -> Path:
        """Why the newest start did nothing; void once ``outcome.json`` is another one."""
        return self.logs / "refused.json"

    @property
    def requeued(self) -> Path:
        """A launcher's word that the job waits in its queue; void once ``outcome.json`` is another one."""
        return self.logs / "requeued.json"

    @property
    def launched(self) -> Path:
        """What a launcher made of the newest end that it saw, and how often it queued the job again after what."""
        return self.logs / "launcher.json"

    @property
    def starts(self) -> Path:
        """Starts in a row that came no further; what the breaker counts."""
        return self.logs / "starts.json"

    @property
    def lock(self) -> Path:
        return self.logs / ".lock"

    @property
    def data_report(self) -> Path:
        return self.logs / "data_report.json"

    @property
    def rejected_rows(self) -> Path:
        """Rows that are not trained on, with file, row and reason."""
        return self.logs / "rejected_rows.parquet"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    @property
    def kernels(self) -> Path:
        """Compiled kernels, from one start to the next, unless the environment names other folders."""
        return self.root / "kernels"

    @property
    def cache(self) -> Path:
        """Token cache, unless ``data.cache_dir`` names another folder."""
        return self.root / "cache"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"


def step_of(folder: Path) -> int | None:
    """Step number of a checkpoint folder by its name, None for any other name."""
    digits = folder.name.removeprefix(STEP_PREFIX)
    return int(digits) if folder.name.startswith(STEP_PREFIX) and digits.isdecimal() else None
