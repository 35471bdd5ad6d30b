"""What is known of a run before anything is started. Torch-free."""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sft_job.checkpoint.files import write_durably
from sft_job.checkpoint.remote_folder import url_problem
from sft_job.config.load import Loaded, run_folder
from sft_job.config.resolve import Resolution, resolve
from sft_job.config.schema import JobConfig
from sft_job.config.topology import count_gpus
from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.data.files import check_data
from sft_job.errors import JobError, Problem, raise_problems


def deadline_of(config: JobConfig, environ: Mapping[str, str], began: float) -> float | None:
    """When the run must be over, by this host's monotonic clock; None = never.

    The earlier of ``trainer.max_wall_seconds`` after ``began`` and the launcher's ``SFT_JOB_END_TIME``.

    Raises:
        ProblemsError: ``SFT_JOB_END_TIME`` is no number (2).
    """
    ends: list[float] = []
    if config.trainer.max_wall_seconds is not None:
        ends.append(began + config.trainer.max_wall_seconds)
    text = environ.get(Env.END_TIME, "").strip()
    if text:
        try:
            end = float(text)
        except ValueError:
            end = math.nan
        ends.append(time.monotonic() + end - time.time())
        if not math.isfinite(end):
            rule, fix = "must be a Unix time in seconds", f"correct {Env.END_TIME} or unset it"
            raise_problems([Problem(ExitCode.CONFIG, Env.END_TIME, rule, fix, text, origin="environment")])
    return min(ends, default=None)


def examined(config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Resolution:
    """Settings, topology, model folder and data files, looked at before anything starts; with all their problems."""
    resolution = resolve(config_arg, overrides, environ, count_gpus(environ))
    if resolution.loaded.readable and resolution.loaded.config.data.train_files:
        resolution.problems += input_problems(resolution.loaded)
    return resolution


def named_folder(resolution: Resolution, environ: Mapping[str, str]) -> RunFolder | None:
    """The run folder of settings that may be wrong, where it or ``CHECKPOINT_DIR`` is there; None where it is not."""
    keys = (Env.CHECKPOINT_DIR, "trainer.default_local_dir")
    if any(problem.subject in keys for problem in resolution.problems):
        return None
    try:
        run = run_folder(resolution.loaded.config)
    except ValueError:
        return None
    given = Path(environ.get(Env.CHECKPOINT_DIR) or "/nowhere").absolute()
    return run if run.root.is_dir() or (run.root.parent == given and given.is_dir()) else None


def make_logs(run: RunFolder) -> None:
    """Make the run folder's ``logs``, and prove that it can be written.

    Raises:
        JobError: it cannot (73).
    """
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        # A name of its own: other nodes, and other starts, try the same folder at the same moment.
        probe = run.logs / f".probe.{socket.gethostname()[:64]}.{os.getpid()}.{uuid.uuid4().hex}"
        write_durably(probe, "")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise JobError(
            ExitCode.CANNOT_CREATE,
            f"the run folder {run.root} cannot be written: {error}\n    fix: another {Env.CHECKPOINT_DIR}, or its "
            f"owner and rights (this process runs as uid {os.getuid()})",
        ) from error


def input_problems(loaded: Loaded) -> list[Problem]:
    """What is wrong with the data files and the second place for checkpoints, with the place of each setting."""
    problems = check_data(loaded.config)
    url = loaded.config.trainer.default_hdfs_dir
    if url is not None and (problem := url_problem(url)):
        problems.append(problem)
    return [p if p.origin else replace(p, origin=loaded.origin(p.subject.partition(":")[0])) for p in problems]
