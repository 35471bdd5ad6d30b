"""The process behind ``sft-job train`` (PID 1 of the image): checks, tokenises, runs the ranks, says how it ended.

Torch-free: it stays small, and its exit code is the job's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sft_job import __version__
from sft_job.checkpoint.files import write_durably
from sft_job.checkpoint.start import START_FILE, Start, fetch_remote, find_start, looks_finished
from sft_job.config.load import dump_config, origins_text, run_folder
from sft_job.config.resolve import Resolution
from sft_job.config.schema import JobConfig
from sft_job.config.secrets import SecretMask
from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.deadline import REASON as DEADLINE
from sft_job.errors import JobError, raise_problems
from sft_job.lock import STILL_SECONDS, RunLock, lost_lock, this_process
from sft_job.nodes import COMING_SECONDS, Nodes, Word
from sft_job.opening import deadline_of, examined, make_logs, named_folder
from sft_job.outcome import (
    last_outcome,
    newest_state,
    note_refusal,
    restarts_so_far,
    result_folder,
    write_early_outcome,
    write_outcome,
)
from sft_job.oversight import Listener, oversee
from sft_job.processes import adopt_orphans, children, end_orphans, reap
from sft_job.ranks import POLL_SECONDS, RankEnd, RankGroup, handed_over, inherited, rank_command, signals_blocked
from sft_job.starts import Starts, begin_start
from sft_job.streams import say
from sft_job.watchdog import Watchdog

_NOTHING_TO_SAVE = "stopped before a new step: nothing to save"
_STOPPED_EARLY = RankEnd(0, ExitCode.STOPPED, _NOTHING_TO_SAVE, {})
_TOO_LATE = RankEnd(0, ExitCode.STOPPED, f"{DEADLINE}: it came before a new step: nothing to save", {})
_ORPHAN_SECONDS = 5.0
_PREPARE_SECONDS = 10.0
_LATE_SIGNAL_SECONDS = 0.5


class Supervisor:
    """One run on this node.

    Args:
        console: where the user reads; problems go to standard error.
        environ: environment of the process.
        still_seconds: how long another holder of the run folder must give no sign of life to be taken over from.
    """

    def __init__(self, console: Console, environ: Mapping[str, str], still_seconds: float = STILL_SECONDS) -> None:
        self._console = console
        self._environ = environ
        self._still_seconds = still_seconds
        self._listener = Listener()
        self._began = time.monotonic()
        self._before: set[int] = set()

    def train(self, config_arg: str | None, overrides: Sequence[str]) -> int:
        """Run the job; its exit code. Never raises for what a user or a rank did."""
        self._listener.install()
        adopt_orphans()
        self._before = children()
        try:
            resolution = examined(config_arg, overrides, self._environ)
            try:
                raise_problems(resolution.problems)
                deadline = deadline_of(resolution.loaded.config, self._environ, self._began)
            except JobError as error:
                self._note(resolution, error)
                raise
            run = run_folder(resolution.loaded.config)
            self._tell(resolution, run)
            patience = max(resolution.loaded.config.trainer.timeout_seconds, COMING_SECONDS)
            with contextlib.closing(Nodes(resolution.topology, patience, self._listener.stopped)) as nodes:
                try:
                    first = resolution.topology.node_rank == 0
                    train = self._train_first if first else self._train_other
                    return train(resolution, run, deadline, nodes)
                except JobError as error:
                    nodes.end(error)
                    raise
        except JobError as error:
            say(f"{error}\n")
            return error.code

    def _train_first(self, resolution: Resolution, run: RunFolder, deadline: float | None, nodes: Nodes) -> int:
        """Look at the run folder, say where the run begins, and run this node's ranks."""
        config = resolution.loaded.config
        try:
            done = self._already_done(config, run)
        except JobError as error:
            self._note(resolution, error)
            raise
        if not done:
            with self._held(run) as lock, self._noted(run, lock):
                # Where the run begins is decided under the lock: nobody changes the folder between this and the start.
                fetch_remote(config, run, self._show)
                start = find_start(config, run)
                self._tell_start(start, run)
                if not start.finished:
                    try:
                        return self._run(resolution, run, start, deadline, lock, nodes)
                    finally:
                        end_orphans(self._before, _ORPHAN_SECONDS)  # while nobody else can hold the run folder
        nodes.agree(Word(ExitCode.DONE, f"already done: {run.final.resolve()}"))
        return ExitCode.DONE

    def _train_other(self, resolution: Resolution, run: RunFolder, deadline: float | None, nodes: Nodes) -> int:
        """Run this node's ranks, when the first node says so; they learn from rank 0 where the run begins."""
        word = nodes.agree(Word())
        if word.code == ExitCode.DONE:
            self._show(word.message)
            return ExitCode.DONE
        if word.code is not None:
            raise JobError(ExitCode(word.code), word.message)
        make_logs(run)
        with tempfile.TemporaryDirectory(prefix="sft_job_") as reports:
            try:
                end = self._work(resolution, run, Path(reports), deadline, None, nodes)
            finally:
                end_orphans(self._before, _ORPHAN_SECONDS)
        self._tell_end(end, run)
        return end.code

    def _already_done(self, config: JobConfig, run: RunFolder) -> bool:
        """Whether the run in this folder is done; if not, its folder for logs is made, which the lock lies in.

        A finished run is not written to, and its folder need not be writable.

        Raises:
            JobError: the run folder cannot be written (73), or cannot be gone on from, which is said first.
        """
        if looks_finished(run):
            with contextlib.suppress(JobError):  # judged under the lock
                start = find_start(config, run)
                if start.finished:
                    self._tell_start(start, run)
                    return True
        try:
            make_logs(run)
        except JobError:
            find_start(config, run)
            raise
        return False

    def _note(self, resolution: Resolution, error: JobError) -> None:
        """Leave ``outcome.json`` of an end before the run folder was held, if nobody holds it and its run is not done.

        Else a note beside it. No folder is made for it but inside one that is there: what names the run folder may be
        what is wrong.
        """
        run = named_folder(resolution, self._environ)
        if run is None or resolution.topology.node_rank > 0:
            return
        lock = RunLock(run, this_process(self._environ))
        with contextlib.suppress(OSError):
            run.logs.mkdir(parents=True, exist_ok=True)
            if looks_finished(run) or not lock.try_acquire():
                note_refusal(run, error.code, str(error), self._environ)
                return
            try:
                write_early_outcome(run, error.code, str(error), self._environ)
            finally:
                lock.release()

    @contextlib.contextmanager
    def _noted(self, run: RunFolder, lock: RunLock) -> Iterator[None]:
        """Leave ``outcome.json`` of an end while the run folder is held; that of a run that is done stays."""
        try:
            yield
        except JobError as error:
            with contextlib.suppress(OSError):
                if lock.lost_to or looks_finished(run):
                    note_refusal(run, error.code, str(error), self._environ)
                else:
                    write_early_outcome(run, error.code, str(error), self._environ)
            raise

    @contextlib.contextmanager
    def _held(self, run: RunFolder) -> Iterator[RunLock]:
        """Hold the run folder while the job runs; the first node does."""
        lock = RunLock(run, this_process(self._environ), still_seconds=self._still_seconds)
        try:
            lock.acquire(stopped=self._listener.stopped, tell=self._show)
        except JobError as error:
            if error.code != ExitCode.STOPPED:
                note_refusal(run, error.code, str(error), self._environ)
            raise
        try:
            yield lock
        finally:
            lock.release()

    def _run(
        self,
        resolution: Resolution,
        run: RunFolder,
        start: Start,
        deadline: float | None,
        lock: RunLock,
        nodes: Nodes,
    ) -> int:
        last = last_outcome(run)
        restarts = restarts_so_far(last, start)
        omitted = int(last.get("restarts_omitted", 0)) if last else 0
        with tempfile.TemporaryDirectory(prefix="sft_job_") as reports:
            folder = Path(reports)
            (folder / START_FILE).write_text(str(start.checkpoint or ""), encoding="utf-8")
            starts = begin_start(run, start.step, last)
            try:
                text = SecretMask(self._environ).text(dump_config(resolution.loaded))
                run.config.write_text(text, encoding="utf-8")
                write_durably(run.starts, replace(starts, gathering=resolution.topology.nnodes > 1).to_json())
                write_outcome(run, None, restarts, omitted, self._environ)
            except OSError as error:
                raise JobError(ExitCode.CANNOT_CREATE, f"{run.logs} cannot be written: {error}") from error
            try:
                starts.refuse(resolution.loaded.config.trainer.max_starts_without_progress, run)
                self._gather(resolution, run, starts, nodes)
                end = self._work(resolution, run, folder, deadline, lock, nodes)
            except JobError as error:
                nodes.end(error)
                end = RankEnd(0, error.code, str(error), {})
        if lock.lost_to:
            raise lost_lock(run, lock.lost_to)
        try:
            write_outcome(run, end, restarts, omitted, self._environ)
        except OSError as error:
            say(f"{run.outcome} cannot be written: {error}\n")
        self._tell_end(end, run)
        return end.code

    def _gather(self, resolution: Resolution, run: RunFolder, starts: Starts, nodes: Nodes) -> None:
        """Wait for the other nodes; from then on the breaker counts this start.

        Raises:
            JobError: a node did not come (137); stopped meanwhile (143); the run folder cannot be written (73).
        """
        if resolution.topology.nnodes == 1:
            return
        self._show(f"waiting for the other nodes: {resolution.topology.nnodes} in all")
        nodes.agree(Word())
        try:
            write_durably(run.starts, starts.to_json())
        except OSError as error:
            raise JobError(ExitCode.CANNOT_CREATE, f"{run.starts} cannot be written: {error}") from error

    def _work(
        self,
        resolution: Resolution,
        run: RunFolder,
        reports: Path,
        deadline: float | None,
        lock: RunLock | None,
        nodes: Nodes,
    ) -> RankEnd:
        """Tokenise, and run the ranks when all nodes have done so."""
        settings = dump_config(resolution.loaded)
        end = self._prepare(settings, run, reports, deadline, lock)
        if end is not None and lock is None:
            return end  # this node's own: the first one will miss it
        word = nodes.agree(Word() if end is None else Word(end.code, end.message))
        if end is None and word.code is not None:
            end = RankEnd(0, ExitCode(word.code), word.message, {})
        return end or self._run_ranks(resolution, run, settings, reports, deadline, lock)

    def _prepare(
        self, settings: str, run: RunFolder, reports: Path, deadline: float | None, lock: RunLock | None
    ) -> RankEnd | None:
        """Tokenise before any rank starts; None where all is well."""
        with (run.logs / "prepare.log").open("ab") as log, handed_over(settings) as resolved, signals_blocked():
            process = subprocess.Popen(
                [sys.executable, "-m", "sft_job.prepare", inherited(resolved)],
                env={**self._environ, Env.REPORT_DIR: str(reports), Env.SUPERVISOR: str(os.getpid())},
                pass_fds=[resolved],
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        while process.poll() is None:
            late = deadline is not None and time.monotonic() >= deadline
            if self._listener.stopped() or late or (lock is not None and lock.lost_to):
                _end_session(process)
                return _TOO_LATE if late else _STOPPED_EARLY
            reap({process.pid})
            time.sleep(POLL_SECONDS)
        if process.returncode == 0:
            return None
        if not self._listener.stopped():
            time.sleep(_LATE_SIGNAL_SECONDS)  # a scheduler signals every process, and this one may be the last
        if self._listener.stopped() or process.returncode == ExitCode.STOPPED:
            return _STOPPED_EARLY
        try:
            report = json.loads((reports / "prepare.json").read_text(encoding="utf-8"))
            return RankEnd(0, ExitCode(report["code"]), report["message"], {})
        except (OSError, ValueError):
            message = f"tokenising ended with code {process.returncode} and without a word"
            return RankEnd(0, _code_of(process.returncode), message, {})

    def _run_ranks(
        self,
        resolution: Resolution,
        run: RunFolder,
        settings: str,
        reports: Path,
        deadline: float | None,
        lock: RunLock | None,
    ) -> RankEnd:
        if self._listener.stopped():
            return _STOPPED_EARLY
        environ = dict(self._environ)
        if lock is not None:
            environ[Env.LOCK] = lock.token
        if deadline is not None:
            environ[Env.DEADLINE] = repr(deadline)
        ranks = RankGroup(rank_command(), resolution.topology, run, reports, environ, settings)
        watchdog = Watchdog(resolution.loaded.config.trainer.timeout_seconds, time.monotonic())
        return oversee(ranks, watchdog, self._listener, lambda: lock is not None and bool(lock.lost_to), self._show)

    def _show(self, text: str) -> None:
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except (OSError, SystemExit):  # rich's answer to a closed pipe: nobody reads, and the run goes on
            self._console.quiet = True

    def _tell(self, resolution: Resolution, run: RunFolder) -> None:
        loaded, topology = resolution.loaded, resolution.topology
        self._show(f"sft_job {__version__}: {topology.world} ranks on {topology.nnodes} node(s), run folder {run.root}")
        self._show(origins_text(loaded))
        for line in (*loaded.mappings, *loaded.ignored):
            self._show(f"note: {line}")
        for line in resolution.warnings:
            self._show(f"warning: {line}")

    def _tell_start(self, start: Start, run: RunFolder) -> None:
        for line in start.notes:
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
        if end.last_lines:
            lines = "".join(f"\n      {line}" for line in end.last_lines)
            message += f"\n    last lines of {run.rank_log(end.rank).name}:{lines}"
        say(f"{message}\n    exit code {int(end.code)} ({end.code.reason}); logs: {run.logs}\n")


def _code_of(returned: int) -> ExitCode:
    """What an exit status means; a signal ended the process where it is below 0."""
    try:
        return ExitCode.LOST if returned < 0 else ExitCode(returned)
    except ValueError:
        return ExitCode.BUG


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started; it may be tokenising in many processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PREPARE_SECONDS)
            return
