"""What ``sft-job submit slurm`` runs; ``sft_job.cli`` loads it when it is asked for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import typer

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.streams import say


def submit(job_file: Path, overrides: Sequence[str], *, dry_run: bool, preflight: bool) -> int:
    """Submit a job file; the exit code, with everything that is wrong said on standard error."""
    if importlib.util.find_spec("submitit") is None:
        say("submitit is not installed\n    fix: pip install 'sft-job[slurm]'\n")
        return ExitCode.CONFIG
    from slurm.submit import submit_job  # noqa: PLC0415  needs submitit

    try:
        return submit_job(job_file, overrides, os.environ, typer.echo, dry_run=dry_run, preflight=preflight)
    except JobError as error:
        say(f"{error}\n")
        return error.code
