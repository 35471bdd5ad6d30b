"""What a run folder tells of its run: everything that ``sft-job status`` shows, as plain values."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from sft_job.checkpoint.folder import published, state_or_none
from sft_job.checkpoint.manifest import MANIFEST, damage
from sft_job.checkpoint.state import TO_GO_ON, RunState
from sft_job.contract import ExitCode, RunFolder, step_of
from sft_job.outcome import last_outcome, last_refusal, newest_state, result_folder
from sft_job.starts import read_starts
from sft_job.status.life import Life
from sft_job.submissions import Judgement, Requeue, Submission, read_judgement, read_requeue

_TAIL_BYTES = 256 * 1024
_RATE_LINES = 20
_LAST_WORDS = 20
_LINE_LENGTH = 500
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PROBLEMS = re.compile(r"\d+ problems?:")
"""Begins what ``ProblemsError`` says."""
Fields = dict[str, Any]


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest checkpoint.

    Attributes:
        folder: its path.
        step: optimizer steps done.
        saved: local time of its manifest, None where it has none.
        fault: why it cannot be gone on from; '' where it can.
        verified: every byte was read; otherwise names and sizes were compared.
    """

    folder: str
    step: int
    saved: str | None
    fault: str
    verified: bool


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        run: the run folder.
        state: running, silent (held, but no sign of life), waiting (queued again), stopped, lost, failed, done, or
            absent (there is no run folder yet).
        code: exit code of the last end; None while it runs, and where it wrote none.
        reason: the word for it in ``outcome.json``.
        message: what the run said at its last end.
        holder: who holds the run folder: host, pid, job, since.
        watched: seconds for which a silent holder was watched.
        step: optimizer steps done, by the newest line of the metrics or the outcome.
        total_steps: of the whole run; None where nothing tells yet.
        epoch: passes over the data.
        loss: mean training loss of a supervised token at ``step``.
        learning_rate: of that step.
        validation_loss: the newest.
        validation_step: its step.
        tokens: trained on so far.
        tokens_per_second_per_gpu: mean over the last lines of the metrics.
        step_seconds: likewise.
        ranks: that wrote the newest checkpoint; None before the first.
        seconds_left: at that speed, without saves and validations; None where it does not run.
        logged: local time of the newest line of the metrics.
        checkpoint: the newest; None where there is none.
        result: folder of the exported model of a finished run.
        restarts: earlier ends, oldest first: cause and step.
        restarts_omitted: ends that the outcome no longer lists.
        without_progress: starts in a row that made no new step: cause and message.
        incomplete: starts among them, not counted, to which not all nodes came: cause and message.
        refusal: code, reason, message and time of a later start that did nothing.
        requeue: the launcher's word that the job waits.
        judgement: what the launcher made of the newest end that it saw, and its counts.
        submission: the launcher's job.
        logs: folder of the run's logs.
        launcher_logs: files that the launcher's job has written.
        last_words: last lines of the newest of them, where the job did not end well.
        held_by: another job than the one that was asked for, which holds the run folder: the rest is that one's.
    """

    run: str
    state: str
    code: int | None = None
    reason: str = ""
    message: str = ""
    holder: Mapping[str, Any] | None = None
    watched: float = 0.0
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    validation_loss: float | None = None
    validation_step: int | None = None
    tokens: int | None = None
    tokens_per_second_per_gpu: float | None = None
    step_seconds: float | None = None
    ranks: int | None = None
    seconds_left: float | None = None
    logged: str | None = None
    checkpoint: CheckpointStatus | None = None
    result: str | None = None
    restarts: tuple[Mapping[str, Any], ...] = ()
    restarts_omitted: int = 0
    without_progress: tuple[Mapping[str, str], ...] = ()
    incomplete: tuple[Mapping[str, str], ...] = ()
    refusal: Mapping[str, Any] | None = None
    requeue: Requeue | None = None
    judgement: Judgement | None = None
    submission: Submission | None = None
    logs: str = ""
    launcher_logs: tuple[str, ...] = ()
    last_words: tuple[str, ...] = ()
    held_by: str = ""


def read_status(run: RunFolder, life: Life, submission: Submission | None = None, *, verify: bool = False) -> RunStatus:
    """Read the run folder, whatever state it is in; nothing is written.

    Args:
        run: the run folder; it need not be there where there is a submission.
        life: what the lock tells.
        submission: the launcher's job.
        verify: read every byte of the newest checkpoint.
    """
    outcome = last_outcome(run) or {}
    requeue, refusal = read_requeue(run), last_refusal(run)
    state = _state(run, outcome, life, requeue, refusal)
    lines = _metrics_tail(run.metrics)
    trained = [line for line in lines if "train/loss" in line]
    validated = next((line for line in reversed(lines) if _number(line, "val/loss") is not None), {})
    newest: Fields = trained[-1] if trained else {}
    saved = newest_state(run)
    saved_state = saved[1] if saved else None
    step = max(int(_number(newest, "step") or 0), int(_number(outcome, "step") or 0))
    total = total_steps(run, saved_state, newest)
    seconds = _mean(line.get("perf/step_seconds") for line in trained[-_RATE_LINES:])
    left = (total - step) * seconds if state == "running" and total is not None and seconds is not None else None
    starts = read_starts(run.starts)
    code = _number(outcome, "code")
    launcher_logs = _launcher_logs(submission)
    judgement = read_judgement(run)
    job = life.holder.job if life.holder is not None and not life.gone else ""
    other = job if submission is not None and job != submission.job else ""
    return RunStatus(
        run=str(run.root),
        state=state,
        code=None if code is None else int(code),
        reason=str(outcome.get("reason", "")),
        message=_clean(str(outcome.get("message", ""))),
        holder=_holder_fields(life),
        watched=life.watched,
        step=step,
        total_steps=total,
        epoch=_number(newest, "epoch"),
        loss=_number(newest, "train/loss") if newest else _number(outcome, "loss"),
        learning_rate=_number(newest, "train/lr"),
        validation_loss=_number(validated, "val/loss"),
        validation_step=validated.get("step"),
        tokens=newest.get("train/tokens"),
        tokens_per_second_per_gpu=_mean(line.get("perf/tokens_per_second_per_gpu") for line in trained[-_RATE_LINES:]),
        step_seconds=seconds,
        ranks=saved_state.world if saved_state else None,
        seconds_left=None if left is None else max(0.0, left),
        logged=_time_of(run.metrics) if newest else None,
        checkpoint=_checkpoint(run, verify),
        result=str(result_folder(run).resolve()) if state == "done" and run.final.exists() else None,
        restarts=tuple(each for each in outcome.get("restarts", ()) if isinstance(each, dict)),
        restarts_omitted=int(_number(outcome, "restarts_omitted") or 0),
        without_progress=tuple({"cause": s.cause, "message": s.message} for s in (starts.failed if starts else ())),
        incomplete=tuple({"cause": s.cause, "message": s.message} for s in (starts.incomplete if starts else ())),
        refusal=None if refusal is None else {**refusal, "message": _clean(str(refusal["message"]))},
        requeue=requeue if state == "waiting" else None,
        judgement=None if judgement is None else replace(judgement, why=_clean(judgement.why)),
        submission=submission,
        logs=str(run.logs),
        launcher_logs=tuple(map(str, launcher_logs)),
        last_words=() if state in ("running", "done", "waiting") and not other else _last_words(launcher_logs),
        held_by=other,
    )


def _state(
    run: RunFolder, outcome: Mapping[str, Any], life: Life, requeue: Requeue | None, refusal: Mapping[str, Any] | None
) -> str:
    """One word. Whoever holds the folder and lives decides; without one its last outcome does."""
    if life.alive:
        return "running"
    if life.holder is not None and not life.gone:
        return "silent"
    code = outcome.get("code")
    retried = (ExitCode.LOST, ExitCode.STOPPED)
    if refusal is not None and code != ExitCode.DONE and not (requeue is not None and refusal["code"] in retried):
        return "failed"
    if requeue is not None:
        return "waiting"
    if not run.root.is_dir():
        return "absent"
    if code is None:
        return "lost"
    return {ExitCode.DONE: "done", ExitCode.STOPPED: "stopped", ExitCode.LOST: "lost"}.get(code, "failed")


def total_steps(run: RunFolder, state: RunState | None, newest: Mapping[str, Any]) -> int | None:
    """Optimizer steps of the whole run: by the settings of the newest start, else as the checkpoint was made for.

    Steps of an epoch are those that the checkpoint says, else what step and epoch of the metrics give.
    """
    trainer: Any = {}
    try:
        trainer = yaml.safe_load(run.config.read_text(encoding="utf-8"))["trainer"]
        asked, epochs = trainer.get("total_training_steps"), trainer.get("total_epochs")
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        asked, epochs = None, None
    if isinstance(asked, int):
        return asked
    step, epoch = _number(newest, "step"), _number(newest, "epoch")
    per_epoch = state.steps_per_epoch if state else round(step / epoch) if step and epoch else None
    if isinstance(epochs, int) and per_epoch:
        return epochs * per_epoch
    return state.total_steps if state else None


def _checkpoint(run: RunFolder, verify: bool) -> CheckpointStatus | None:
    """The newest one that is there; a run that goes on may remove one while it is looked at."""
    for folder in reversed(published(run)):
        state = state_or_none(folder)
        fault = damage(folder, sums=verify) or ""
        if not fault and state is None:
            fault = "state.json cannot be read"
        if not fault and state is not None and not set(state.contents) >= TO_GO_ON:
            fault = f"it holds {', '.join(state.contents)} only"
        if folder.is_dir():
            saved = _time_of(folder / MANIFEST)
            return CheckpointStatus(str(folder), step_of(folder) or 0, saved, fault, verify)
    return None


def _metrics_tail(path: Path) -> list[Fields]:
    """The last lines of the metrics, a half-written one left out."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            raw = file.read()
    except OSError:
        return []
    found: list[Fields] = []
    for line in raw.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def _holder_fields(life: Life) -> Fields | None:
    holder = life.holder
    if holder is None:
        return None
    return {"host": holder.host, "pid": holder.pid, "job": holder.job, "since": holder.since, "gone": life.gone}


def _launcher_logs(submission: Submission | None) -> list[Path]:
    """Files of the job, the one written last at the end."""
    patterns = submission.logs if submission else ()
    found: dict[Path, float] = {}
    for pattern in patterns:
        for name in glob.glob(pattern):  # noqa: PTH207  the pattern is absolute
            try:
                found[Path(name)] = Path(name).stat().st_mtime
            except OSError:
                continue
    return sorted(found, key=lambda path: (found[path], path))


def _last_words(files: list[Path]) -> tuple[str, ...]:
    """Last lines of the newest file that is not empty; from its last list of problems on, where it holds one."""
    for path in reversed(files):
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            continue
        lines = [line[:_LINE_LENGTH] for line in _clean(text).splitlines() if line.strip()]
        if lines:
            begins = [place for place, line in enumerate(lines) if _PROBLEMS.fullmatch(line)]
            return tuple(lines[begins[-1] :] if begins else lines[-_LAST_WORDS:])
    return ()


def _clean(text: str) -> str:
    """Without what could steer a terminal."""
    return _CONTROL.sub("", text)


def _time_of(path: Path) -> str | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")
    except OSError:
        return None


def _number(fields: Mapping[str, Any], key: str) -> float | None:
    value = fields.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return sum(numbers) / len(numbers) if numbers else None
