"""Where records go: ``metrics.jsonl`` always; the console, wandb and tensorboard where asked for.

A record is a flat dict with ``step``. Only ``metrics.jsonl`` may end the run (a full disk is an error that users must
see); every other logger runs where its failures cost a warning and never a step.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError
from sft_job.metrics.console import ConsoleLogger
from sft_job.metrics.tensorboard_logger import TensorboardLogger
from sft_job.metrics.wandb_logger import WandbLogger

Warn = Callable[[str], None]

# file is metrics.jsonl, which needs no naming.
KNOWN_LOGGERS = ("console", "wandb", "tensorboard", "file")


class Logger(Protocol):
    """Something that takes records."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Finish; no record comes after it."""
        ...


class JsonlLogger:
    """``metrics.jsonl``: one JSON object a line, flushed, never NaN, each step once.

    Lines of steps after ``resume_step`` and half-written ones (from a process that was killed) are cut first: the file
    is written anew beside the old one and renamed, so that no instant leaves it without its good lines.

    Only rank 0 has it, and the others wait for no error of it: while the run goes on, lines that cannot be written wait
    in memory for the next attempt, which is the next line's.

    Args:
        path: the file; its folder is made.
        resume_step: step that the run goes on from; 0 = from the start.

    Raises:
        JobError: the file cannot be written (exit code 73), here and in ``close``.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._path = path
        self.warn: Warn = logging.getLogger("sft_job").warning
        """Takes the first failure."""
        self._warned = False
        self._waiting = bytearray()
        self._step = -1
        self._logged: set[tuple[str, ...]] = set()  # the key sets logged at self._step
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._cut(resume_step)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._cannot_write(error) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line, unless one of this kind was already written for this step."""
        if not self._is_new(record):
            return
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False)
        self._waiting += f"{line}\n".encode()
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.warn(f"{self._path}: cannot be written: {error.strerror} (its lines wait in memory; free space)")

    def close(self) -> None:
        """Write what waits, and close the file."""
        try:
            with self._file:
                self._write()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _write(self) -> None:
        while self._waiting:  # a disk that is nearly full takes a part
            del self._waiting[: self._file.write(self._waiting)]

    def _is_new(self, record: Mapping[str, Any]) -> bool:
        """Training and validation lines share a step: a line is told by its step and its keys."""
        kind = tuple(sorted(record))
        if record["step"] != self._step:
            self._step, self._logged = record["step"], set()
        if kind in self._logged:
            return False
        self._logged.add(kind)
        return True

    def _cut(self, resume_step: int) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as old:
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            changed = False
            with os.fdopen(handle, "wb") as new:
                for line in old:
                    record = _parsed(line)
                    if record is not None and record["step"] <= resume_step:
                        self._is_new(record)
                        new.write(line)
                    else:
                        changed = True
                new.flush()
                os.fsync(new.fileno())
            if changed:
                Path(name).chmod(self._path.stat().st_mode)  # mkstemp's files are for the owner alone
                Path(name).replace(self._path)
            else:
                Path(name).unlink()

    def _cannot_write(self, error: OSError) -> JobError:
        return JobError(
            ExitCode.CANNOT_CREATE, f"{self._path}: cannot be written: {error.strerror}\n    fix: free space or rights"
        )


class BackgroundLogger:
    """Runs a logger on a thread of its own, so that it can be slow, hang or fail without the loop noticing.

    Records wait in a bounded queue; where it is full they are dropped and counted. The first failure of the inner
    logger is one warning; what comes after it is silent.

    Args:
        inner: the logger; it is used only from the thread.
        name: what warnings call it.
        warn: takes the text of a warning.
        capacity: records that may wait.
        close_seconds: longest wait in ``close``.
    """

    def __init__(
        self, inner: Logger, *, name: str, warn: Warn, capacity: int = 1024, close_seconds: float = 30.0
    ) -> None:
        self._inner = inner
        self._name = name
        self._warn = warn
        self._close_seconds = close_seconds
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._failed = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"{name}-logger", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand over a copy of the record; never blocks."""
        try:
            self._queue.put_nowait(dict(record))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self._warn(f"{self._name} does not keep up: records are dropped there (metrics.jsonl has them all)")

    def close(self) -> None:
        """Let waiting records out and finish the inner logger; waits at most ``close_seconds``."""
        self._closing.set()
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._warn(f"{self._name} did not finish within {self._close_seconds:g} s: its last records may be missing")
        if self.dropped:
            self._warn(f"{self._name}: {self.dropped} records were dropped (metrics.jsonl has them all)")

    def _run(self) -> None:
        while True:
            try:
                record = self._queue.get(timeout=0.2)
            except queue.Empty:
                if self._closing.is_set():
                    break
                continue
            self._attempt(self._inner.log, record)
        self._attempt(self._inner.close)

    def _attempt(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # an outage of whatever kind must not reach the loop
            if not self._failed:
                self._failed = True
                self._warn(
                    f"{self._name}: {type(error).__name__}: {error} (training goes on; metrics.jsonl has it all)"
                )


class Loggers:
    """Several loggers as one. Only ``metrics.jsonl`` may raise, and only in ``close``.

    Args:
        jsonl: the record of the run; it comes first.
        console: progress, where there is one.
        others: loggers that keep their failures to themselves.
    """

    def __init__(self, jsonl: Logger, console: ConsoleLogger | None, others: Sequence[Logger]) -> None:
        self._jsonl = jsonl
        self._console = console
        self._others = others

    def log(self, record: Mapping[str, Any]) -> None:
        """Give the record to every logger."""
        self._jsonl.log(record)
        self._on_console(lambda console: console.log(record))
        for logger in self._others:
            logger.log(record)

    def message(self, text: str) -> None:
        """Show a line above the progress; dropped where there is no console."""
        self._on_console(lambda console: console.message(text))

    def _on_console(self, show: Callable[[ConsoleLogger], None]) -> None:
        """Nobody reading any more (a closed pipe, a lost terminal) ends the showing, not the run."""
        try:
            if self._console is not None:
                show(self._console)
        except (OSError, SystemExit):  # rich answers a closed pipe with SystemExit
            self._console = None

    def warning(self, text: str) -> None:
        """Show a warning, from any thread: on the console, or through this package's Python logger."""
        _warn_on(self._console)(text)

    def close(self) -> None:
        """Close all of them, the console first: what the others warn of is then below its last line."""
        self._on_console(lambda console: console.close())
        for logger in self._others:
            logger.close()
        self._jsonl.close()


def make_loggers(
    names: Iterable[str],
    run: RunFolder,
    *,
    total_steps: int,
    resume_step: int = 0,
    project: str = "sft_job",
    experiment: str = "sft",
    config: Mapping[str, Any] | None = None,
    warn: Warn | None = None,
) -> Loggers:
    """Loggers of rank 0.

    Args:
        names: any of ``KNOWN_LOGGERS``; ``metrics.jsonl`` is always written. A name that is not known, or whose
            package is not installed, is a warning.
        run: the run folder.
        total_steps: steps of the whole run.
        resume_step: step that the run goes on from.
        project: wandb's project.
        experiment: the run's name in wandb.
        config: resolved settings, shown in wandb.
        warn: takes the text of a warning; by default a line of the console, or of this package's Python logger.

    Raises:
        JobError: ``metrics.jsonl`` cannot be written (exit code 73).
    """
    wanted = list(dict.fromkeys(names))
    jsonl = JsonlLogger(run.metrics, resume_step)
    console = ConsoleLogger(total_steps, resume_step) if "console" in wanted else None
    if warn is None:
        warn = _warn_on(console)
    jsonl.warn = warn
    others: list[Logger] = []
    if _usable("wandb", wanted, warn):
        inner = WandbLogger(run.wandb, project=project, name=experiment, config=config or {}, warn=warn)
        others.append(BackgroundLogger(inner, name="wandb", warn=warn, close_seconds=inner.longest_close))
    if _usable("tensorboard", wanted, warn):
        others.append(BackgroundLogger(TensorboardLogger(run.tensorboard, resume_step), name="tensorboard", warn=warn))
    for name in wanted:
        if name not in KNOWN_LOGGERS:
            warn(f"trainer.logger names {name!r}, which this job does not know (known: {', '.join(KNOWN_LOGGERS)})")
    return Loggers(jsonl, console, others)


def _warn_on(console: ConsoleLogger | None) -> Warn:
    return console.warning if console is not None else logging.getLogger("sft_job").warning


def _usable(package: str, wanted: Sequence[str], warn: Warn) -> bool:
    """Whether a logger that has a package of its own name is wanted and installed."""
    if package not in wanted:
        return False
    if importlib.util.find_spec(package) is None:
        warn(
            f"trainer.logger names {package}, which is not installed (pip install {package}): training goes on "
            "without it"
        )
        return False
    return True


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, None for a damaged one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record


def _finite(value: Any) -> Any:
    """The value with NaN and infinities replaced by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
