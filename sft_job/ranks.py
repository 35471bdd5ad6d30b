"""The ranks of one node as child processes: started together, told to stop together, ended together. Torch-free."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job import processes
from sft_job.config.secrets import SecretMask
from sft_job.config.topology import Topology
from sft_job.contract import STACK_SIGNAL, STOP_SIGNALS, Env, ExitCode, RunFolder
from sft_job.errors import JobError
from sft_job.pulse import pulse_file, read_beat
from sft_job.tuning import tuned
from sft_job.watchdog import Seen

POLL_SECONDS = 0.1
_LAST_LINES = 15
_LAST_BYTES = 16384
_MARGIN_BYTES = 16384
_LINE_LENGTH = 300
_PENDING_CONNECTIONS = 4096
_KILL_SECONDS = 10.0
_UNKILLABLE = "does not end even by SIGKILL: it waits for a disk or a device that does not answer"


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended.

    Attributes:
        rank: global rank.
        code: exit code by section of the contract; LOST where a signal killed it.
        message: what it said, or which signal it was.
        report: what it left for the outcome (step, loss, weights).
        stuck: the supervisor ended it, because it held up the others.
        last_lines: of its log, where it died without a word.
    """

    rank: int
    code: ExitCode
    message: str
    report: Mapping[str, Any]
    stuck: bool = False
    last_lines: tuple[str, ...] = ()


def listen(topology: Topology) -> socket.socket:
    """The socket on which the ranks meet, open before they start: nobody else can take its port in between.

    On one node it is on the loopback interface, at a free port unless MASTER_PORT names one.

    Raises:
        JobError: the port that was named is taken (137: whoever holds it may be gone the next time).
    """
    port = topology.master_port or 0
    try:
        if topology.nnodes == 1:
            return socket.create_server(("127.0.0.1", port), backlog=_PENDING_CONNECTIONS)
        if socket.has_dualstack_ipv6():
            family = socket.AF_INET6
            return socket.create_server(("", port), family=family, dualstack_ipv6=True, backlog=_PENDING_CONNECTIONS)
        return socket.create_server(("", port), backlog=_PENDING_CONNECTIONS)
    except OSError as error:
        raise JobError(
            ExitCode.LOST,
            f"{Env.MASTER_PORT} = {port}: the ranks cannot meet there: {error.strerror or error}\n    fix: another "
            f"{Env.MASTER_PORT}, the same on every node" + (", or none on one node" if topology.nnodes == 1 else ""),
        ) from error


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Start children with our signals blocked: one that comes early waits until the child listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, STACK_SIGNAL))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RankGroup:
    """The ranks of this node.

    Args:
        command: what each rank runs.
        topology: how many there are, here and elsewhere.
        run: their logs go to its folder.
        reports: folder in which each leaves its end.
        environ: environment they start from.
        settings: for each of them, in a file without a name; its path ends the command. None = no settings.

    Raises:
        JobError: MASTER_PORT is taken on this host (137).
    """

    def __init__(
        self,
        command: Sequence[str],
        topology: Topology,
        run: RunFolder,
        reports: Path,
        environ: Mapping[str, str],
        settings: str | None = None,
    ) -> None:
        self._reports = reports
        self._mask = SecretMask(environ)
        self._run = run
        self._settings = settings
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._asked_to_stop = False
        self._stuck: dict[int, str] = {}
        self._memory_kills = processes.memory_kills()
        first = topology.node_rank * topology.nproc_per_node
        self._log_starts = {rank: self._log_size(rank) for rank in range(first, first + topology.nproc_per_node)}
        self._asked_sizes: dict[int, int] = {}
        threads = max(1, len(os.sched_getaffinity(0)) // topology.nproc_per_node)
        shared = {
            "WORLD_SIZE": str(topology.world),
            "LOCAL_WORLD_SIZE": str(topology.nproc_per_node),
            "MASTER_ADDR": topology.master_addr if topology.nnodes > 1 else "127.0.0.1",
            "MASTER_PORT": str(topology.master_port),
            Env.REPORT_DIR: str(reports),
            Env.SUPERVISOR: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", str(threads)),
            **tuned(environ, run, threads),
        }
        with contextlib.ExitStack() as opened:
            store: socket.socket | None = None
            if topology.node_rank == 0:
                store = opened.enter_context(listen(topology))
                shared["MASTER_PORT"] = str(store.getsockname()[1])
            for local in range(topology.nproc_per_node):
                rank = first + local
                own = {"RANK": str(rank), "LOCAL_RANK": str(local)}
                given = [store.fileno()] if store is not None and rank == 0 else []
                if given:
                    own[Env.STORE_FD] = str(given[0])
                self._processes[rank] = self._start(command, rank, {**environ, **shared, **own}, given)

    def _start(
        self, command: Sequence[str], rank: int, environ: Mapping[str, str], given: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as opened:
            if self._settings is not None:
                resolved = opened.enter_context(handed_over(self._settings))
                command, given = [*command, inherited(resolved)], [*given, resolved]
            log = opened.enter_context(self._run.rank_log(rank).open("ab"))
            opened.enter_context(signals_blocked())
            return subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                # Rank 0's standard output is the user's progress line; everything else is the rank's log.
                stdout=None if rank == 0 else log,
                stderr=log,
                # A session of its own: a Ctrl-C reaches the supervisor alone, which passes on one wish to stop.
                start_new_session=True,
                pass_fds=given,
            )

    @property
    def pids(self) -> set[int]:
        """Process ids of the ranks."""
        return {process.pid for process in self._processes.values()}

    def ask_to_stop(self) -> bool:
        """Pass the wish to stop on: the ranks agree on a step, save and leave. True the first time."""
        if self._asked_to_stop:
            return False
        self._asked_to_stop = True
        self._signal(signal.SIGTERM)
        return True

    def ask_for_stacks(self) -> None:
        """Let each living rank write the stacks of all its threads to its log; it goes on with what it does."""
        self._asked_sizes = {rank: self._log_size(rank) for rank in self._living()}
        self._signal(STACK_SIGNAL)

    def seen(self) -> dict[int, Seen]:
        """The living ranks, as they look from here."""
        return {
            rank: Seen(read_beat(pulse_file(self._reports, rank)), processes.bytes_moved(process.pid))
            for rank, process in self._living().items()
        }

    def kill(self) -> None:
        """End what is still there, and what it shared in memory; what the kernel cannot end is left behind."""
        living = self._living()
        shared = [path for process in living.values() for path in processes.shared_memory(process.pid)]
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + _KILL_SECONDS
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for path in shared:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def kill_stuck(self, seconds: float) -> None:
        """End ranks that have not moved for so long; say of the likely culprits what is known, here and in their logs.

        Culprits are those that are stopped or did not answer the request for their stacks, else those with the fewest
        signs of life.
        """
        living = self._living()
        beats = {rank: read_beat(pulse_file(self._reports, rank)) for rank in living}
        notes: dict[int, str] = {}
        for rank, process in living.items():
            if processes.state(process.pid) in ("T", "t"):
                notes[rank] = "; its process is stopped (SIGSTOP), so that it cannot show its stack"
            elif self._asked_sizes.get(rank) == self._log_size(rank):
                notes[rank] = "; it did not answer the request for its stack"
        fewest = min((beat.count for beat in beats.values()), default=0)
        culprits = set(notes) or {rank for rank, beat in beats.items() if beat.count == fewest}
        for rank in living:
            beat = beats[rank]
            self._stuck[rank] = ""
            if rank in culprits:
                text = f"rank {rank} made no progress for {seconds:.0f} s while {beat.phase}, after step {beat.step}"
                self._stuck[rank] = f"{text}{notes.get(rank, '')}; stacks: {self._run.logs}/rank_*.log"
                self._note(rank, f"{text}{notes.get(rank, '')}; the supervisor ends it")
        self.kill()

    def _note(self, rank: int, text: str) -> None:
        with contextlib.suppress(OSError), self._run.rank_log(rank).open("a", encoding="utf-8") as log:
            log.write(f"supervisor: {text}\n")

    def _living(self) -> dict[int, subprocess.Popen[bytes]]:
        return {rank: process for rank, process in self._processes.items() if process.poll() is None}

    def _signal(self, number: signal.Signals) -> None:
        for process in self._living().values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def step(self) -> bool:
        """Wait a moment; True when all ranks have ended."""
        time.sleep(POLL_SECONDS)
        return not self._living()

    def one_failed(self) -> bool:
        """Some rank ended in a way that the others cannot go on without."""
        codes = [process.poll() for process in self._processes.values()]
        return any(code not in (None, ExitCode.DONE, ExitCode.STOPPED) for code in codes)

    def ends(self) -> list[RankEnd]:
        """How each rank ended; all of them have, or were to be killed and cannot be."""
        return [self._end(rank, process.poll()) for rank, process in sorted(self._processes.items())]

    def _end(self, rank: int, returned: int | None) -> RankEnd:
        report: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            report = json.loads((self._reports / f"rank_{rank}.json").read_text(encoding="utf-8"))
        if returned is None:
            stuck = self._stuck.get(rank)
            message = f"{stuck}; it {_UNKILLABLE}" if stuck else f"rank {rank} {_UNKILLABLE}"
            return RankEnd(rank, ExitCode.LOST, message, {}, stuck=bool(stuck))
        if returned < 0:
            return self._killed(rank, -returned, report)
        try:
            code = ExitCode(returned)
        except ValueError:
            message = f"rank {rank} ended with exit code {returned}"
            return RankEnd(rank, ExitCode.BUG, message, report, last_lines=self._last_lines(rank))
        lines = () if report else self._last_lines(rank)
        return RankEnd(rank, code, str(report.get("message", "")), report, last_lines=lines)

    def _killed(self, rank: int, number: int, report: Mapping[str, Any]) -> RankEnd:
        if rank in self._stuck and number == signal.SIGKILL:
            message = self._stuck[rank]
            gone_with_others = report or {"message": "ended with the others"}
            return RankEnd(rank, ExitCode.LOST, message, {} if message else gone_with_others, stuck=bool(message))
        message = f"rank {rank} was killed by {_signal_name(number)}"
        if number == signal.SIGKILL:
            message += self._why_killed()
        return RankEnd(rank, ExitCode.LOST, message, report, last_lines=self._last_lines(rank))

    def _why_killed(self) -> str:
        now = processes.memory_kills()
        if now is not None and self._memory_kills is not None and now > self._memory_kills:
            return ": out of host memory, the kernel ended it (oom_kill in this container's memory events has grown)"
        return "; where nobody sent it, the host may have run out of memory"

    def _log_size(self, rank: int) -> int:
        try:
            return self._run.rank_log(rank).stat().st_size
        except OSError:
            return 0

    def _last_lines(self, rank: int) -> tuple[str, ...]:
        return last_lines(self._run.rank_log(rank), self._log_starts[rank], self._mask)


def last_lines(log: Path, start: int, mask: SecretMask | None = None) -> tuple[str, ...]:
    """The last lines of a log from byte ``start`` on, without control characters; none where it cannot be read.

    Secrets, which only Python's own output is free of, are hidden before anything is cut.
    """
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            # The margin holds the beginning of a secret that is cut in two by the limit.
            file.seek(max(start, end - _LAST_BYTES - _MARGIN_BYTES))
            text = file.read(_LAST_BYTES + _MARGIN_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ()
    text = (mask.text(text) if mask is not None else text)[-_LAST_BYTES:]
    plain = (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).replace("\t", "  ") for line in re.split(r"[\r\n]+", text))
    printable = ("".join(each for each in line if each.isprintable())[:_LINE_LENGTH] for line in plain)
    return tuple(line for line in printable if line.strip())[-_LAST_LINES:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def verdict(ends: Sequence[RankEnd]) -> RankEnd:
    """The one end that explains the others: a stated cause, else a killed rank, a bug, a stuck rank, a loss, a stop."""

    def weight(end: RankEnd) -> int:
        if end.code in (ExitCode.DONE, ExitCode.STOPPED):
            return 1 if end.code == ExitCode.STOPPED else 0
        if end.stuck:
            return 3
        if end.code == ExitCode.LOST:
            return 2 if end.report else 5  # without a report it was killed: the others only noticed
        return 4 if end.code == ExitCode.BUG else 6

    return max(ends, key=weight)


def rank_command() -> list[str]:
    """What a rank runs, but for its settings: they are final, the environment is not looked at again."""
    return [sys.executable, "-m", "sft_job.train", "--resolved"]


@contextlib.contextmanager
def handed_over(text: str) -> Iterator[int]:
    """A descriptor of a file without a name that holds a text, for one child: whatever dies, nothing is left."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        yield file.fileno()


def inherited(descriptor: int) -> str:
    """The path under which a child finds a descriptor that it was given."""
    return f"/dev/fd/{descriptor}"
