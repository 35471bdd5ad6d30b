"""Tokenises pieces in several processes and hands the results back in the pieces' order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from sft_job.contract import ExitCode
from sft_job.data.pieces import Piece
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenise import PieceResult, PieceTokeniser
from sft_job.errors import JobError

_PARALLELISM = "TOKENIZERS_PARALLELISM"
# Imported once by the fork server, so that each worker starts at once and shares these pages.
_PRELOADED = ["sft_job.data.tokenise", "transformers.models.auto.tokenization_auto"]


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the share that a container's cgroup leaves it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _cgroup_cores(Path("/sys/fs/cgroup")) or cores))


def _cgroup_cores(root: Path) -> int | None:
    """Whole cores that the cgroup's quota amounts to, at least one; None where there is no quota."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()[:2]
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return max(1, int(quota) // int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):  # no cgroup here, or "max"
        return None


def tokenise_here(tokeniser: PieceTokeniser, pieces: Iterable[Piece]) -> Generator[PieceResult, None, None]:
    """Results one after the other, in this process."""
    for piece in pieces:
        with _one_thread():
            result = tokeniser.run(piece)
        yield result


def tokenise_in_processes(
    spec: CacheSpec, folder: Path, pieces: Iterable[Piece], workers: int
) -> Generator[PieceResult, None, None]:
    """Results in the order of the pieces. Closing the iterator ends the processes.

    A worker gets its next piece when it has handed in the last one, so at most one piece for each worker, and one
    more that is read ahead, are in memory.

    Raises:
        JobError: exit 137, where a worker was killed.
        OSError: a part cannot be written.
    """
    crew = _Crew(spec, folder, workers)
    try:
        yield from crew.results(iter(pieces))
    finally:
        crew.close()


class _Crew:
    """Worker processes, each at the end of its own pipe: if this process dies, theirs reads its end and they leave."""

    def __init__(self, spec: CacheSpec, folder: Path, workers: int) -> None:
        # Not fork: the tokenizers library and torch have threads, whose locks a forked child would inherit.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._processes: dict[Connection, BaseProcess] = {}
        self._idle: list[Connection] = []
        for number in range(workers):
            ours, theirs = context.Pipe()
            arguments = (theirs, spec, folder)
            process = context.Process(target=_work, args=arguments, name=f"tokenise-{number}", daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process
            self._idle.append(ours)

    def results(self, pieces: Iterator[Piece]) -> Iterator[PieceResult]:
        finished: dict[int, PieceResult] = {}
        next_index = 0
        piece = next(pieces, None)
        while piece is not None or len(self._idle) < len(self._processes):
            if piece is not None and self._idle:
                self._send(self._idle.pop(), piece)
                piece = next(pieces, None)
                continue
            for connection in self._ready():
                result = self._receive(connection)
                finished[result.index] = result
                self._idle.append(connection)
            while next_index in finished:
                yield finished.pop(next_index)
                next_index += 1

    def _ready(self) -> list[Connection]:
        busy = [connection for connection in self._processes if connection not in self._idle]
        return [connection for connection in wait(busy) if isinstance(connection, Connection)]

    def _send(self, connection: Connection, piece: Piece) -> None:
        try:
            connection.send(piece)
        except OSError as error:
            raise self._lost(connection) from error

    def _receive(self, connection: Connection) -> PieceResult:
        try:
            answer: PieceResult | Exception = connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._lost(connection) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _lost(self, connection: Connection) -> JobError:
        process = self._processes[connection]
        process.join()
        return JobError(
            ExitCode.LOST,
            f"{process.name} of {len(self._processes)} ended with {process.exitcode} while it was tokenising\n"
            "    fix: where memory ran out, fewer processes (data.num_workers) or more memory; then run it again",
        )

    def close(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            if len(self._idle) < len(self._processes):
                process.terminate()
        for process in self._processes.values():
            process.join()


def _work(connection: Connection, spec: CacheSpec, folder: Path) -> None:
    # The parent is interrupted too, and ends this process by closing the pipe, or with SIGTERM.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.environ[_PARALLELISM] = "false"  # one process a core already
    try:
        tokeniser = PieceTokeniser(spec, folder)
        while True:
            connection.send(tokeniser.run(connection.recv()))
    except (EOFError, ConnectionError):
        return
    except (OSError, JobError) as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"in a tokenising process:\n{traceback.format_exc()}"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the tokenizers library from starting threads, which make a later fork of this process unsafe."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before
