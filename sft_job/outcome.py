"""``outcome.json``: how a run ended, for launchers and people, and the ends of its earlier starts. Torch-free."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sft_job import __version__
from sft_job.checkpoint.files import write_durably
from sft_job.checkpoint.folder import published, state_or_none
from sft_job.checkpoint.start import Start
from sft_job.checkpoint.state import RunState
from sft_job.config.secrets import SecretMask
from sft_job.contract import ExitCode, RunFolder
from sft_job.ranks import RankEnd
from sft_job.starts import RUNNING, begin_start
from sft_job.submissions import outcome_digest
from sft_job.version import commit

_RESTARTS_LISTED = 100


def result_folder(run: RunFolder) -> Path:
    """Where a finished run's result lies: ``huggingface``, or ``adapter`` of a LoRA run."""
    found = [path for name in ("huggingface", "adapter") if (path := run.final / name).is_dir()]
    return found[0] if found else run.final


def newest_state(run: RunFolder) -> tuple[Path, RunState] | None:
    """The newest checkpoint whose state can be read."""
    for folder in reversed(published(run)):
        state = state_or_none(folder)
        if state is not None:
            return folder, state
    return None


def last_outcome(run: RunFolder) -> dict[str, Any] | None:
    """What the start before this one left; None where there is none, or it cannot be read."""
    try:
        record = json.loads(run.outcome.read_text(encoding="utf-8"))
        complete = {"reason", "step", "restarts"} <= record.keys() and isinstance(record["restarts"], list)
    except (OSError, ValueError, AttributeError):
        return None
    return record if complete else None


def restarts_so_far(last: Mapping[str, Any] | None, start: Start) -> list[dict[str, Any]]:
    """Earlier ends of this run, oldest first; one that wrote nothing at its end was lost.

    A start that the breaker refused started nothing, and is not one of them.
    """
    if last is None:
        return [] if start.checkpoint is None else [{"cause": ExitCode.LOST.reason, "step": start.step}]
    if last["reason"] == ExitCode.NO_PROGRESS.reason:
        return list(last["restarts"])
    if last["reason"] == RUNNING:
        return [*last["restarts"], {"cause": ExitCode.LOST.reason, "step": start.step}]
    return [*last["restarts"], {"cause": last["reason"], "step": last["step"]}]


def write_early_outcome(run: RunFolder, code: ExitCode, message: str, environ: Mapping[str, str]) -> None:
    """Write ``outcome.json`` of an end before anything was started; the breaker does not count it.

    Args:
        run: the run folder, held by this process.
        code: how it ended.
        message: what the user was told.
        environ: tells the commit.

    Raises:
        OSError: it cannot be written.
    """
    saved, last = newest_state(run), last_outcome(run)
    start = Start(*saved) if saved else Start()
    starts = begin_start(run, start.step, last)
    write_durably(run.starts, replace(starts, settled=True).to_json())
    omitted = int(last.get("restarts_omitted", 0)) if last else 0
    write_outcome(run, RankEnd(0, code, message, {}), restarts_so_far(last, start), omitted, environ)


def write_outcome(
    run: RunFolder,
    end: RankEnd | None,
    restarts: Sequence[Mapping[str, Any]],
    omitted: int,
    environ: Mapping[str, str],
) -> None:
    """Write ``outcome.json``: how the run ended, for launchers and people; while it runs, code is null.

    Args:
        run: the run folder.
        end: the end that explains the others; None while the run runs.
        restarts: earlier ends; the newest 100 are listed.
        omitted: how many were left out of the list before.
        environ: tells the commit.

    Raises:
        OSError: it cannot be written.
    """
    saved = newest_state(run)
    folder, state = saved if saved else (None, None)
    report = end.report if end is not None else {}
    listed = list(restarts)[-_RESTARTS_LISTED:]
    record = {
        "code": None if end is None else int(end.code),
        "reason": RUNNING if end is None else end.code.reason,
        "message": "" if end is None else end.message,
        "step": report.get("step", state.step if state else 0),
        "loss": report.get("loss", state.loss if state else None),
        "checkpoint": str(folder) if folder else None,
        "restarts": listed,
        "restarts_omitted": omitted + len(restarts) - len(listed),
        "weights_sha256": report.get("weights_sha256") or None,
        "version": __version__,
        "commit": commit(environ),
    }
    write_durably(run.outcome, json.dumps(SecretMask(environ).tree(record), indent=1) + "\n")


def note_refusal(run: RunFolder, code: ExitCode, message: str, environ: Mapping[str, str]) -> None:
    """Leave beside ``outcome.json``, which stays as it is, why a start ended before it did anything.

    For people who look at the run folder alone (``sft-job status``); where it cannot be written nothing happens.
    """
    with contextlib.suppress(OSError):
        note = {
            "outcome": outcome_digest(run),
            "code": int(code),
            "reason": code.reason,
            "message": SecretMask(environ).text(message),
            "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        if run.logs.is_dir():
            write_durably(run.refusal, json.dumps(note, indent=1) + "\n")


def last_refusal(run: RunFolder) -> dict[str, Any] | None:
    """What ``note_refusal`` left, unless the run was started since; None where there is none."""
    try:
        note = json.loads(run.refusal.read_text(encoding="utf-8"))
        valid = note["outcome"] == outcome_digest(run) and {"code", "reason", "message", "at"} <= note.keys()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return note if valid else None
