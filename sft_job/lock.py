"""The run folder's lock: who holds it, for which of the launcher's jobs, and whether it still lives. Torch-free.

``logs/.lock`` is one JSON record of fixed length. Its holder adds one to ``beat`` every few seconds. Another process
never compares clocks or file times, which differ between hosts: it watches, by its own monotonic clock, whether the
record changes. Only ``link``, ``rename`` and ``unlink`` have to be atomic, so the lock holds on NFS too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from sft_job.contract import Env, ExitCode, RunFolder
from sft_job.errors import JobError

STILL_SECONDS = 30.0
"""A holder whose beat has not changed for so long may be taken over from."""
BEAT_SECONDS = 3.0
_SIZE = 1024
_POLLS_PER_STILL = 60
_MISSING_SECONDS = 10.0
# File systems without hard links say one of these.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)


@dataclass(frozen=True)
class Holder:
    """What the lock says of the process that holds it.

    Attributes:
        host: its host name, for people.
        pid: its process id there.
        born: when that process began, in the host's own ticks: a pid alone may be another process by now.
        place: the boot and the process namespace in which the pid means something.
        start: this start's own id, the token that fencing compares.
        job: the launcher's job, the same over its requeues.
        since: local time at which it took the lock, for people.
        beat: grows as long as it lives.
    """

    host: str
    pid: int
    born: str
    place: str
    start: str
    job: str
    since: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, job {self.job}, since {self.since}"

    def record(self) -> bytes:
        """The lock file's content, always of the same length."""
        return json.dumps(asdict(self)).encode().ljust(_SIZE - 1) + b"\n"


def this_process(environ: Mapping[str, str]) -> Holder:
    """This process as a holder; without ``SFT_JOB_ID`` it is a job of its own."""
    start = uuid.uuid4().hex
    return Holder(
        host=socket.gethostname()[:200],
        pid=os.getpid(),
        born=_born(os.getpid()),
        place=_place(),
        start=start,
        job=environ.get(Env.JOB_ID, "").strip()[:200] or start,
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


class RunLock:
    """The lock of one run folder, for one process.

    Args:
        run: the run folder; its ``logs`` exists.
        me: this process.
        still_seconds: how long a holder's beat must be still before it is taken over from.
        beat_seconds: time between two beats of our own.
    """

    def __init__(
        self,
        run: RunFolder,
        me: Holder,
        *,
        still_seconds: float = STILL_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._path = run.lock
        self._root = run.root
        self._me = me
        self._still_seconds = still_seconds
        self._beat_seconds = beat_seconds
        self._file = -1
        self._released = threading.Event()
        self._beating: threading.Thread | None = None
        self.lost_to: str = ""
        """Who took the lock away from this process; '' while it is held."""

    @property
    def token(self) -> str:
        """What ``still_held`` compares."""
        return self._me.start

    def acquire(self, *, stopped: Callable[[], bool], tell: Callable[[str], None]) -> None:
        """Take the lock, and keep it alive until ``release``.

        A holder of the same job is waited for, until it leaves or has been still for ``still_seconds``; one of another
        job is only watched that long. On this host a holder that is gone is taken over from at once.

        Args:
            stopped: true once somebody asked this process to stop.
            tell: takes what the user should know while it waits.

        Raises:
            JobError: a live run of another job holds the folder, or it cannot be written (73); stopped meanwhile (143).
        """
        try:
            self._wait(stopped, tell)
        except OSError as error:
            raise JobError(ExitCode.CANNOT_CREATE, f"{self._path}: cannot be written: {error}") from error
        self._beating = threading.Thread(target=self._beat, name="run-folder lock", daemon=True)
        self._beating.start()

    def try_acquire(self) -> bool:
        """Take the lock for a moment, without a sign of life, if nobody holds it or its holder on this host is gone.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._create():
            return True
        record = _read(self._path)
        holder = _holder(record) if record is not None else None
        if record is None or holder is None or not _is_gone(holder, self._me):
            return False
        self._take_over(record, lambda _: None, "is gone")
        return self._create()

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        self._released.set()
        if self._beating is not None:
            self._beating.join(self._beat_seconds + 5)
            self._beating = None
        with contextlib.suppress(OSError):
            if self._holds():
                self._path.unlink()
        self._close()

    def _wait(self, stopped: Callable[[], bool], tell: Callable[[str], None]) -> None:
        seen: bytes | None = None
        since, told = 0.0, False
        while not self._create():
            now = time.monotonic()
            record = _read(self._path)
            if record is None:  # it was released just now
                continue
            if stopped():
                raise JobError(ExitCode.STOPPED, "stopped while another run held the run folder: nothing to save")
            holder = _holder(record)
            if record != seen:
                if seen is not None and holder is not None and holder.job != self._me.job:
                    raise self._refused(holder)
                seen, since = record, now
            gone = holder is not None and _is_gone(holder, self._me)
            if gone or now - since >= self._still_seconds:
                self._take_over(record, tell, "is gone" if gone else f"was still for {self._still_seconds:g} s")
                continue
            if not told:
                told = True
                tell(f"the run folder is held by {holder or 'a run that cannot be told'}: waiting for it")
            time.sleep(self._still_seconds / _POLLS_PER_STILL)

    def _create(self) -> bool:
        """Make the lock file; False where there is one."""
        temporary = self._path.with_name(f"{self._path.name}.{self._me.start}")
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, self._me.record())
            os.fsync(file)
            made = self._link(temporary)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(file)
        if made:
            # Beats go to this file, whatever its name is by then: they can never overwrite another holder's lock.
            self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        return made and self._holds()

    def _link(self, temporary: Path) -> bool:
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            return self._holds()  # NFS may have made the link and lost the answer
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_exclusively()
        return True

    def _create_exclusively(self) -> bool:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        os.write(file, self._me.record())
        os.fsync(file)
        os.close(file)
        return True

    def _take_over(self, record: bytes, tell: Callable[[str], None], why: str) -> None:
        """Take the lock file away, so that ``_create`` can make its own; put it back if it is not the one watched."""
        aside = self._path.with_name(f"{self._path.name}.taken.{self._me.start}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != record:  # it beat after all, or another process was faster and holds it now
            with contextlib.suppress(OSError):
                os.link(aside, self._path)
        else:
            tell(f"the run folder's last holder {why} and is taken over from: {_holder(record) or 'unknown'}")
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(self._beat_seconds):
            # A file server that is away for a while is no reason to stop; nobody else can take the lock meanwhile.
            with contextlib.suppress(OSError):
                if not self._still_ours():
                    return
                self._me = replace(self._me, beat=self._me.beat + 1)
                os.pwrite(self._file, self._me.record(), 0)
                os.fsync(self._file)

    def _still_ours(self) -> bool:
        record = _read(self._path)
        if record is None:  # removed by hand, or a take-over that will see our new lock and step back
            self._close()
            if self._create():
                return True
            record = _read(self._path)
        holder = _holder(record) if record is not None else None
        if holder is not None and holder.start != self._me.start:
            self.lost_to = str(holder)
            return False
        return True

    def _holds(self) -> bool:
        holder = _holder(_read(self._path) or b"")
        return holder is not None and holder.start == self._me.start

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _refused(self, holder: Holder) -> JobError:
        return JobError(
            ExitCode.CANNOT_CREATE,
            f"the run folder {self._root} is held by another run: {holder}\n    fix: wait for it, stop it, or use "
            f"another {Env.CHECKPOINT_DIR}; a launcher that starts the same job again sets {Env.JOB_ID}",
        )


def still_held(run: RunFolder, token: str, missing_seconds: float = _MISSING_SECONDS) -> bool:
    """Whether the run folder's lock is still that of ``token``: to be asked before a checkpoint is published.

    A lock that was removed by hand is made again by its holder; it is waited for a little.
    """
    deadline = time.monotonic() + missing_seconds
    while True:
        holder = _holder(_read(run.lock) or b"")
        if holder is not None:
            return holder.start == token
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def current_holder(run: RunFolder) -> Holder | None:
    """Who holds the run folder, alive or not; None where nobody does.

    Raises:
        OSError: the lock cannot be read.
    """
    return _holder(_read(run.lock) or b"")


def lives_here(holder: Holder) -> bool | None:
    """Whether the holder still runs; None where this host and process namespace cannot tell."""
    if not holder.place or holder.place != _place():
        return None
    return _born(holder.pid) == holder.born


def lost_lock(run: RunFolder, holder: str = "") -> JobError:
    """The end of a run whose folder another run has taken over."""
    return JobError(
        ExitCode.CANNOT_CREATE,
        f"the run folder {run.root} was taken over by another run{f' ({holder})' if holder else ''}, because this one "
        "gave no sign of life for a while; nothing more was written\n    fix: let that run go on, or stop it before "
        "this one is started again",
    )


def _read(path: Path) -> bytes | None:
    """The file's bytes; None where there is none."""
    try:
        # Opening the folder makes an NFS client look whether names in it have changed.
        os.close(os.open(path.parent, os.O_RDONLY))
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        raise


def _holder(record: bytes) -> Holder | None:
    """The holder that a lock file names; None where it cannot be read (another version's, or being written)."""
    try:
        return Holder(**json.loads(record))
    except (ValueError, TypeError):
        return None


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process of this place began; '' where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_gone(holder: Holder, me: Holder) -> bool:
    """The holder ran where this process runs, and runs no more."""
    return bool(holder.place) and holder.place == me.place and _born(holder.pid) != holder.born


def confirm_lock(run: RunFolder, environ: Mapping[str, str]) -> Callable[[], None] | None:
    """What asks before a checkpoint is published whether the supervisor still holds the run folder; None without one.

    The callable raises a JobError (73) where another run has taken the folder over.
    """
    token = environ.get(Env.LOCK)
    if token is None:
        return None

    def confirm() -> None:
        if not still_held(run, token):
            raise lost_lock(run)

    return confirm
