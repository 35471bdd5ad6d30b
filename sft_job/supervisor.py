"""The process behind ``sft-job train`` (PID 1 of the image): checks, tokenises, runs the ranks, says how it ended.

Torch-free: it stays small, and its exit code is the job's own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from sft_job import __version__
from sft_job.checkpoint.folder import published, write_durably
from sft_job.checkpoint.start import Start, find_start
from sft_job.checkpoint.state import read_state
from sft_job.config.load import dump_config, origins_text, run_folder
from sft_job.config.resolve import Resolution, resolve
from sft_job.config.topology import count_gpus
from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.data.files import check_data
from sft_job.errors import JobError, raise_problems
from sft_job.ranks import LOST_GRACE_SECONDS, POLL_SECONDS, RankEnd, RankGroup, rank_command, verdict
from sft_job.version import commit

_STOPPED_EARLY = RankEnd(0, ExitCode.STOPPED, "stopped before the first step: nothing to save yet", {})
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Supervisor:
    """One run on this node.

    Args:
        console: where the user reads; problems go to standard error.
        environ: environment of the process.
    """

    def __init__(self, console: Console, environ: Mapping[str, str]) -> None:
        self._console = console
        self._environ = environ
        self._stop_signal = 0

    def train(self, config_arg: str | None, overrides: Sequence[str]) -> int:
        """Run the job; its exit code. Never raises for what a user or a rank did."""
        try:
            resolution = checked(config_arg, overrides, self._environ)
            run = run_folder(resolution.loaded.config)
            start = find_start(resolution.loaded.config, run)
            self._tell(resolution, start, run)
            if start.finished:
                return ExitCode.DONE
            _make_logs(run)
        except JobError as error:
            sys.stderr.write(f"{error}\n")
            return error.code
        for number in _SIGNALS:
            signal.signal(number, self._note_signal)
        restarts = _restarts(run, start)
        with tempfile.TemporaryDirectory(prefix="sft_job_") as reports:
            folder = Path(reports)
            resolved = folder / "config.yaml"
            resolved.write_text(dump_config(resolution.loaded), encoding="utf-8")
            if resolution.topology.node_rank == 0:
                shutil.copyfile(resolved, run.config)
            end = self._prepare(resolved, run, folder) or self._run_ranks(resolution, run, resolved, folder)
        if resolution.topology.node_rank == 0:
            write_outcome(run, end, restarts, self._environ)
        self._tell_end(end, run)
        return end.code

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = self._stop_signal or number

    def _prepare(self, resolved: Path, run: RunFolder, reports: Path) -> RankEnd | None:
        """Tokenise before any rank starts; None where all is well."""
        with (run.logs / "prepare.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sft_job.prepare", str(resolved)],
                env={**self._environ, Env.REPORT_DIR: str(reports)},
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        while process.poll() is None:
            if self._stop_signal:
                # It may be tokenising in many processes: its whole session ends.
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                return _STOPPED_EARLY
            time.sleep(POLL_SECONDS)
        if process.returncode == 0:
            return None
        try:
            report = json.loads((reports / "prepare.json").read_text(encoding="utf-8"))
            return RankEnd(0, ExitCode(report["code"]), report["message"], {})
        except (OSError, ValueError):
            message = f"tokenising ended with code {process.returncode} and without a word"
            return RankEnd(0, ExitCode.LOST if process.returncode < 0 else ExitCode.BUG, message, {})

    def _run_ranks(self, resolution: Resolution, run: RunFolder, resolved: Path, reports: Path) -> RankEnd:
        if self._stop_signal:
            return _STOPPED_EARLY
        ranks = RankGroup(rank_command(resolved), resolution.topology, run, reports, self._environ)
        deadline: float | None = None
        while not ranks.step():
            if self._stop_signal:
                ranks.ask_to_stop()
            if deadline is None and ranks.one_failed():
                deadline = time.monotonic() + LOST_GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                ranks.kill()
        return verdict(ranks.ends())

    def _tell(self, resolution: Resolution, start: Start, run: RunFolder) -> None:
        loaded, topology = resolution.loaded, resolution.topology
        out = self._console.print
        out(f"sft_job {__version__}: {topology.world} ranks on {topology.nnodes} node(s), run folder {run.root}")
        out(origins_text(loaded), markup=False, highlight=False)
        for line in (*loaded.mappings, *loaded.ignored):
            out(f"note: {line}", markup=False, highlight=False)
        for line in (*resolution.warnings, *start.notes):
            out(f"warning: {line}", markup=False, highlight=False)
        if start.finished:
            out(f"already done: {run.final.resolve()}", markup=False, highlight=False)

    def _tell_end(self, end: RankEnd, run: RunFolder) -> None:
        if end.code == ExitCode.DONE:
            self._console.print(f"done: {run.final}/huggingface", markup=False, highlight=False)
            return
        message = end.message or end.code.reason
        if end.code == ExitCode.STOPPED:
            saved = published(run)
            place = saved[-1].name if saved else "the start"
            message = f"{end.message or 'stopped'}; run it again to go on from {place}"
        sys.stderr.write(f"{message}\n    exit code {int(end.code)} ({end.code.reason}); logs: {run.logs}\n")


def checked(config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Resolution:
    """Settings, topology, model folder and data files, all looked at before anything starts.

    Raises:
        ProblemsError: everything that is wrong, at once.
    """
    resolution = resolve(config_arg, overrides, environ, count_gpus(environ))
    problems = list(resolution.problems)
    if resolution.loaded.readable and resolution.loaded.config.data.train_files:
        problems += check_data(resolution.loaded.config)
    raise_problems(problems)
    return resolution


def _make_logs(run: RunFolder) -> None:
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        write_durably(run.logs / ".probe", "")
        (run.logs / ".probe").unlink()
    except OSError as error:
        raise JobError(
            ExitCode.CANNOT_CREATE,
            f"the run folder {run.root} cannot be written: {error}\n    fix: another {Env.CHECKPOINT_DIR}, or its "
            f"owner and rights (this process runs as uid {os.getuid()})",
        ) from error


def _restarts(run: RunFolder, start: Start) -> list[dict[str, Any]]:
    """Earlier ends of this run, oldest first; a start that finds a checkpoint and no outcome follows a lost one."""
    try:
        last = json.loads(run.outcome.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [] if start.checkpoint is None else [{"cause": ExitCode.LOST.reason, "step": start.step}]
    run.outcome.unlink(missing_ok=True)
    return [*last.get("restarts", []), {"cause": last.get("reason"), "step": last.get("step")}]


def write_outcome(
    run: RunFolder, end: RankEnd, restarts: Sequence[Mapping[str, Any]], environ: Mapping[str, str]
) -> None:
    """Write ``outcome.json``: how the run ended, for launchers and people."""
    saved = published(run)
    step, loss = end.report.get("step"), end.report.get("loss")
    if step is None and saved:
        state = read_state(saved[-1])
        step, loss = state.step, state.loss
    record = {
        "code": int(end.code),
        "reason": end.code.reason,
        "message": end.message,
        "step": step or 0,
        "loss": loss,
        "checkpoint": str(saved[-1]) if saved else None,
        "restarts": list(restarts),
        "weights_sha256": end.report.get("weights_sha256") or None,
        "version": __version__,
        "commit": commit(environ),
    }
    write_durably(run.outcome, json.dumps(record, indent=1) + "\n")
