"""What ``sft-job submit kubernetes`` runs; ``sft_job.cli`` loads it when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from deploy.kubernetes.submit import submit_job
from sft_job.errors import JobError
from sft_job.streams import say


def submit(job_file: Path, overrides: Sequence[str], *, kind: str | None, dry_run: bool) -> int:
    """Submit a job file; the exit code, with everything that is wrong said on standard error."""
    try:
        return submit_job(job_file, overrides, os.environ, typer.echo, kind=kind, dry_run=dry_run)
    except JobError as error:
        say(f"{error}\n")
        return error.code
