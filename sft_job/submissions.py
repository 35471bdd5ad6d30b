"""Which run folder a launcher's job writes: records that launchers leave and ``sft-job status`` reads. Torch-free.

Nothing here knows a launcher. One that submits a job calls ``remember`` on the machine where people ask for it later;
one that queues a job again calls ``note_requeue``, which leaves a word in the run folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError, Problem, ProblemsError

_LAUNCHER = re.compile(r"[a-z][a-z0-9_]{0,31}")
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_NAMED = re.compile(rf"(?:(?P<launcher>{_LAUNCHER.pattern}):)?(?P<job>{_JOB.pattern})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Submission:
    """One job of a launcher.

    Attributes:
        launcher: its name: ``slurm``.
        job: the job's id there, the same when it is queued again: what ``SFT_JOB_ID`` says.
        run: the run folder that it writes, as an absolute path of this machine.
        logs: files that hold what it says, each a path or a pattern with ``*``; they may not be there yet.
        ask: a command line by which people ask the launcher for the job; only shown.
        submitted: local time.
        place: what holds the run folder where this machine need not see it; '' where it does.
    """

    launcher: str
    job: str
    run: str
    logs: tuple[str, ...] = ()
    ask: str = ""
    submitted: str = ""
    place: str = ""

    def __str__(self) -> str:
        return f"{self.launcher} job {self.job}"


@dataclass(frozen=True)
class Requeue:
    """A job that was queued again and has not started since."""

    launcher: str
    job: str
    since: str

    def __str__(self) -> str:
        return f"{self.launcher} job {self.job}, since {self.since}"


@dataclass(frozen=True)
class Judgement:
    """What a launcher made of the end of one start.

    Attributes:
        launcher: its name.
        job: the job's id there.
        start: how often it was queued again before.
        why: what becomes of the job and why, for people.
        counts: cause -> how often it was queued again after it, this end included.
        at: local time.
    """

    launcher: str
    job: str
    start: int
    why: str
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    at: str = ""

    def __str__(self) -> str:
        return f"{self.launcher} job {self.job}, start {self.start}"


def state_folder(environ: Mapping[str, str]) -> Path:
    """Where the records of this user are: ``$XDG_STATE_HOME/sft_job/jobs``, by default below ``~/.local/state``.

    Raises:
        ProblemsError: there is no home (2).
    """
    base = environ.get("XDG_STATE_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "sft_job" / "jobs"
    home = environ.get("HOME", "")
    if not Path(home).is_absolute():
        rule = "must be an absolute path: records of submitted jobs are kept below it"
        raise ProblemsError([Problem(ExitCode.CONFIG, "HOME", rule, "set HOME or XDG_STATE_HOME", home, "environment")])
    return Path(home) / ".local" / "state" / "sft_job" / "jobs"


def record(
    launcher: str,
    job: str,
    run: Path,
    *,
    environ: Mapping[str, str],
    logs: Sequence[str | Path] = (),
    ask: str = "",
    place: str = "",
) -> Path:
    """Remember a job that was just submitted; one of the same id is replaced.

    Args:
        launcher: small letters, digits and ``_``.
        job: letters, digits, ``.``, ``_`` and ``-``.
        run: the run folder; it need not be there yet.
        environ: tells where records are kept.
        logs: files with what the job says: paths, or patterns with ``*``.
        ask: a command line that asks the launcher for the job.
        place: what holds the run folder where this machine need not see it.

    Returns:
        The record's file.

    Raises:
        ValueError: launcher or job have other characters, or a text holds a control character.
        ProblemsError: there is no home (2), or the record cannot be written (73).
    """
    _refuse_odd(launcher, job)
    texts = (str(run), ask, place, *map(str, logs))
    if any(_CONTROL.search(text) for text in texts):
        raise ValueError(f"a control character in {texts!r}")
    paths = tuple(str(Path(log).absolute()) for log in logs)
    submission = Submission(launcher, job, str(Path(run).absolute()), paths, ask, _now(), place)
    folder = state_folder(environ)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{launcher}-{job}.json"
        _replace(path, asdict(submission))
    except OSError as error:
        rule, fix = f"cannot be written: {error.strerror or error}", "its rights and space, or another XDG_STATE_HOME"
        raise ProblemsError([Problem(ExitCode.CANNOT_CREATE, str(folder), rule, fix)]) from error
    return path


def remember(
    launcher: str,
    job: str,
    run: Path,
    *,
    environ: Mapping[str, str],
    logs: Sequence[str | Path] = (),
    ask: str = "",
    place: str = "",
) -> list[str]:
    """Record a job that was just submitted, and say where its run folder is and how people ask how it stands.

    The job is submitted all the same where it cannot be recorded: then the lines say so, and why.

    Args:
        launcher, job, run, environ, logs, ask, place: as for ``record``.

    Returns:
        Lines for the user.

    Raises:
        ValueError: as ``record``.
    """
    try:
        record(launcher, job, run, environ=environ, logs=logs, ask=ask, place=place)
        fault = None
    except JobError as error:
        fault = error
    if place:  # which this machine need not see: whoever is asked there knows most
        known = f"what is known of it here: sft-job status {job}"
        unknown = f"(sft-job status {job} does not know it: {fault})"
        return [f"run folder: {run} on {place}", f"how it stands: {ask}", unknown if fault else known]
    unknown = f"how it stands: sft-job status {run} (not by the job's id: {fault})"
    return [f"run folder: {run}", unknown if fault else f"how it stands: sft-job status {job}"]


def find(text: str, environ: Mapping[str, str]) -> Submission:
    """The job that a user names as ``JOBID`` or ``LAUNCHER:JOBID``.

    Raises:
        ProblemsError: no such job is known here, or launchers share the id (2).
    """
    named = _NAMED.fullmatch(text)
    folder = state_folder(environ)
    found: list[Submission] = []
    if named:
        launcher, job = named["launcher"] or "*", named["job"]
        # A launcher's name has no dash, so what stands before the first one is all of it.
        paths = [path for path in folder.glob(f"{launcher}-{job}.json") if path.stem.partition("-")[2] == job]
        found = [each for each in map(_read, sorted(paths)) if each is not None]
    if len(found) == 1:
        return found[0]
    if found:
        rule = f"several launchers have this job: {', '.join(f'{each.launcher}:{job}' for each in found)}"
        raise ProblemsError([Problem(ExitCode.CONFIG, "JOBID", rule, "name the launcher too", text)])
    rule = f"is neither a folder nor a job that was submitted from here (looked in {folder})"
    raise ProblemsError([Problem(ExitCode.CONFIG, "RUN", rule, "name the run folder, or its CHECKPOINT_DIR", text)])


def note_requeue(run: RunFolder, launcher: str, job: str) -> None:
    """Say in the run folder that the launcher has queued the job again; the next start makes it void.

    Where it cannot be written nothing happens: it is only for people.

    Raises:
        ValueError: launcher or job have characters that ``record`` refuses.
    """
    _refuse_odd(launcher, job)
    with contextlib.suppress(OSError):
        note = {"outcome": outcome_digest(run), **asdict(Requeue(launcher, job, _now()))}
        _replace(run.requeued, note)


def read_requeue(run: RunFolder) -> Requeue | None:
    """The launcher's word that the job waits; None where there is none, or the run has started or ended since."""
    try:
        note = json.loads(run.requeued.read_text(encoding="utf-8"))
        if note.pop("outcome") != outcome_digest(run):
            return None
        return Requeue(**{name: str(value) for name, value in note.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def note_judgement(run: RunFolder, launcher: str, job: str, start: int, why: str, counts: Mapping[str, int]) -> None:
    """Leave in the run folder what becomes of the job; only for people, so that one that cannot be written is left out.

    A node that was cut off comes late: what was said of a later start of the same job stays.

    Raises:
        ValueError: launcher or job have characters that ``record`` refuses.
    """
    _refuse_odd(launcher, job)
    known = read_judgement(run)
    if known is not None and (known.launcher, known.job) == (launcher, job) and known.start > start:
        return
    with contextlib.suppress(OSError):
        _replace(run.launched, asdict(Judgement(launcher, job, start, why, dict(counts), _now())))


def read_judgement(run: RunFolder) -> Judgement | None:
    """What a launcher said last; None where none did, or it cannot be read."""
    try:
        note = json.loads(run.launched.read_text(encoding="utf-8"))
        counts = {str(cause): int(number) for cause, number in note["counts"].items()}
        words = {name: str(note[name]) for name in ("launcher", "job", "why", "at")}
        return Judgement(start=int(note["start"]), counts=counts, **words)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def outcome_digest(run: RunFolder) -> str:
    """Of ``outcome.json``, for a note that is void after the next start or end: each of them writes another one."""
    try:
        return hashlib.sha256(run.outcome.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _refuse_odd(launcher: str, job: str) -> None:
    if not _LAUNCHER.fullmatch(launcher) or not _JOB.fullmatch(job):
        raise ValueError(f"launcher {launcher!r}, job {job!r}: not a name and an id of a job")


def _read(path: Path) -> Submission | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        logs = tuple(map(str, fields.pop("logs")))
        submission = Submission(**{name: str(value) for name, value in fields.items()}, logs=logs)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return submission if Path(submission.run).is_absolute() else None


def _replace(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a small file at once: others see the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(fields, indent=1) + "\n")
        Path(name).chmod(0o644)  # mkstemp's files are for the owner alone
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
