"""Which run folder a user means: the folder itself, its ``CHECKPOINT_DIR``, anything below it, or a launcher's job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sft_job.contract import Env, ExitCode, RunFolder, step_of
from sft_job.errors import Problem, ProblemsError
from sft_job.submissions import Submission, find

_BELOW_CHECKPOINT_DIR = "sft"


def locate(named: str | None, environ: Mapping[str, str]) -> tuple[RunFolder, Submission | None]:
    """The run folder, and the launcher's job where the user named one; the folder of a job need not be there.

    Args:
        named: a folder, ``JOBID`` or ``LAUNCHER:JOBID``; None = ``$CHECKPOINT_DIR``.
        environ: environment variables.

    Raises:
        ProblemsError: it is no run folder and no job that was submitted from here (2).
    """
    if named is None:
        named = environ.get(Env.CHECKPOINT_DIR, "")
        if not named:
            rule = "is needed: a run folder, anything below it, its CHECKPOINT_DIR, or the id of a submitted job"
            raise ProblemsError([Problem(ExitCode.CONFIG, "RUN", rule, "sft-job status $CHECKPOINT_DIR")])
    path = Path(named).expanduser()
    try:
        there = path.exists()
    except (OSError, ValueError) as error:
        raise _no_run(named, f"cannot be looked at: {error}") from error
    if not there:
        if "/" in named:
            raise _no_run(named, "there is no such folder")
        submission = find(named, environ)
        return RunFolder(Path(submission.run)), submission
    path = path.resolve()
    folder = next((each for each in (path / _BELOW_CHECKPOINT_DIR, path, *path.parents) if _is_run(each)), None)
    if folder is None:
        raise _no_run(named, "is no run folder: it holds no logs and no checkpoints of a run, nor does one above it")
    return RunFolder(folder), None


def _is_run(folder: Path) -> bool:
    """Whether a run was started in this folder: its logs or its checkpoints have our names."""
    run = RunFolder(folder)
    try:
        marks = (run.outcome, run.lock, run.config, run.metrics, run.latest)
        if any(mark.is_file() for mark in marks) or (run.logs / "prepare.log").is_file():
            return True
        return run.checkpoints.is_dir() and any(step_of(path) is not None for path in run.checkpoints.iterdir())
    except OSError:
        return False


def _no_run(named: str, rule: str) -> ProblemsError:
    fix = "name the run folder ($CHECKPOINT_DIR/sft) or its CHECKPOINT_DIR; a run makes its folder when it starts"
    return ProblemsError([Problem(ExitCode.CONFIG, "RUN", rule, fix, named)])
