"""The process behind ``sft-job train`` (PID 1 of the image): checks, tokenises, runs the ranks, says how it ended.

Torch-free: it stays small, and its exit code is the job's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import filelock
from rich.console import Console

from sft_job import __version__
from sft_job.checkpoint.folder import published, state_or_none, write_durably
from sft_job.checkpoint.remote_folder import url_problem
from sft_job.checkpoint.start import START_FILE, Start, fetch_remote, find_start
from sft_job.checkpoint.state import RunState
from sft_job.config.load import Loaded, dump_config, origins_text, run_folder
from sft_job.config.resolve import Resolution, resolve
from sft_job.config.topology import Topology, count_gpus
from sft_job.contract import STOP_SIGNALS, Env, ExitCode, RunFolder
from sft_job.data.files import check_data
from sft_job.errors import JobError, Problem, raise_problems
from sft_job.ranks import LOST_GRACE_SECONDS, POLL_SECONDS, RankEnd, RankGroup, rank_command, verdict
from sft_job.version import commit

_STOPPED_EARLY = RankEnd(0, ExitCode.STOPPED, "stopped before the first step: nothing to save yet", {})
RUNNING = "running"


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
        for number in STOP_SIGNALS:
            signal.signal(number, self._note_signal)
        try:
            resolution = checked(config_arg, overrides, self._environ)
            run = run_folder(resolution.loaded.config)
            if resolution.topology.node_rank == 0:
                fetch_remote(resolution.loaded.config, run, self._show)
            start = find_start(resolution.loaded.config, run)
            self._tell(resolution, start, run)
            if start.finished:
                return ExitCode.DONE
            _make_logs(run)
            with held(run, resolution.topology):
                return self._run(resolution, run, start)
        except JobError as error:
            sys.stderr.write(f"{error}\n")
            return error.code

    def _run(self, resolution: Resolution, run: RunFolder, start: Start) -> int:
        first = resolution.topology.node_rank == 0
        restarts = restarts_so_far(run, start)
        with tempfile.TemporaryDirectory(prefix="sft_job_") as reports:
            folder = Path(reports)
            resolved = folder / "config.yaml"
            resolved.write_text(dump_config(resolution.loaded), encoding="utf-8")
            (folder / START_FILE).write_text(str(start.checkpoint or ""), encoding="utf-8")
            try:
                if first:
                    shutil.copyfile(resolved, run.config)
                    write_outcome(run, None, restarts, self._environ)
            except OSError as error:
                raise JobError(ExitCode.CANNOT_CREATE, f"{run.logs} cannot be written: {error}") from error
            end = self._prepare(resolved, run, folder) or self._run_ranks(resolution, run, resolved, folder)
        if first:
            try:
                write_outcome(run, end, restarts, self._environ)
            except OSError as error:
                sys.stderr.write(f"{run.outcome} cannot be written: {error}\n")
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
            if self._stop_signal and ranks.ask_to_stop():
                name = signal.Signals(self._stop_signal).name
                self._show(f"{name}: the ranks finish their step, save and leave")
            if deadline is None and ranks.one_failed():
                deadline = time.monotonic() + LOST_GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                ranks.kill()
        return verdict(ranks.ends())

    def _show(self, text: str) -> None:
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except (OSError, SystemExit):  # rich's answer to a closed pipe: nobody reads, and the run goes on
            self._console.quiet = True

    def _tell(self, resolution: Resolution, start: Start, run: RunFolder) -> None:
        loaded, topology = resolution.loaded, resolution.topology
        self._show(f"sft_job {__version__}: {topology.world} ranks on {topology.nnodes} node(s), run folder {run.root}")
        self._show(origins_text(loaded))
        for line in (*loaded.mappings, *loaded.ignored):
            self._show(f"note: {line}")
        for line in (*resolution.warnings, *start.notes):
            self._show(f"warning: {line}")
        if start.finished:
            self._show(f"already done: {run.final.resolve()}")

    def _tell_end(self, end: RankEnd, run: RunFolder) -> None:
        if end.code == ExitCode.DONE:
            self._show(f"done: {result_folder(run)}")
            return
        message = end.message or end.code.reason
        if end.code == ExitCode.STOPPED:
            saved = newest_state(run)
            place = saved[0].name if saved else "the start"
            message = f"{end.message or 'stopped'}; run it again to go on from {place}"
        sys.stderr.write(f"{message}\n    exit code {int(end.code)} ({end.code.reason}); logs: {run.logs}\n")


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


@contextlib.contextmanager
def held(run: RunFolder, topology: Topology) -> Iterator[None]:
    """Hold the run folder while the job runs; the first node does.

    Raises:
        JobError: another run holds it (73).
    """
    if topology.node_rank > 0:
        yield
        return
    lock = filelock.FileLock(run.logs / ".lock", blocking=False)
    try:
        with lock:
            yield
    except filelock.Timeout as error:
        raise JobError(
            ExitCode.CANNOT_CREATE,
            f"the run folder {run.root} is held by another run on this machine\n    fix: wait for it, stop it, or use "
            f"another {Env.CHECKPOINT_DIR}",
        ) from error


def checked(config_arg: str | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Resolution:
    """Settings, topology, model folder and data files, all looked at before anything starts.

    Raises:
        ProblemsError: everything that is wrong, at once.
    """
    resolution = resolve(config_arg, overrides, environ, count_gpus(environ))
    problems = list(resolution.problems)
    if resolution.loaded.readable and resolution.loaded.config.data.train_files:
        problems += input_problems(resolution.loaded)
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


def input_problems(loaded: Loaded) -> list[Problem]:
    """What is wrong with the data files and the second place for checkpoints, with the place of each setting."""
    problems = check_data(loaded.config)
    url = loaded.config.trainer.default_hdfs_dir
    if url is not None and (problem := url_problem(url)):
        problems.append(problem)
    return [p if p.origin else replace(p, origin=loaded.origin(p.subject.partition(":")[0])) for p in problems]


def restarts_so_far(run: RunFolder, start: Start) -> list[dict[str, Any]]:
    """Earlier ends of this run, oldest first; one that wrote nothing at its end was lost."""
    try:
        last = json.loads(run.outcome.read_text(encoding="utf-8"))
        earlier = list(last["restarts"])
    except (OSError, ValueError, KeyError, TypeError):
        return [] if start.checkpoint is None else [{"cause": ExitCode.LOST.reason, "step": start.step}]
    if last["reason"] == RUNNING:
        return [*earlier, {"cause": ExitCode.LOST.reason, "step": start.step}]
    return [*earlier, {"cause": last["reason"], "step": last["step"]}]


def write_outcome(
    run: RunFolder, end: RankEnd | None, restarts: Sequence[Mapping[str, Any]], environ: Mapping[str, str]
) -> None:
    """Write ``outcome.json``: how the run ended, for launchers and people; while it runs, code is null.

    Raises:
        OSError: it cannot be written.
    """
    saved = newest_state(run)
    folder, state = saved if saved else (None, None)
    report = end.report if end is not None else {}
    record = {
        "code": None if end is None else int(end.code),
        "reason": RUNNING if end is None else end.code.reason,
        "message": "" if end is None else end.message,
        "step": report.get("step", state.step if state else 0),
        "loss": report.get("loss", state.loss if state else None),
        "checkpoint": str(folder) if folder else None,
        "restarts": list(restarts),
        "weights_sha256": report.get("weights_sha256") or None,
        "version": __version__,
        "commit": commit(environ),
    }
    write_durably(run.outcome, json.dumps(record, indent=1) + "\n")
