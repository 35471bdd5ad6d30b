"""Checkpoints in a second place: whatever folder fsspec can write (s3://, gs://, hdfs://, file://, a plain path).

Torch-free. Nothing is renamed there, because object stores cannot: a checkpoint's files come first and its manifest
last, and what has no manifest is not a checkpoint. Reading trusts sizes and SHA-256 alone.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sft_job.checkpoint.files import Files, write_durably
from sft_job.checkpoint.folder import mark_final, published
from sft_job.checkpoint.manifest import MANIFEST, damage, files_below
from sft_job.checkpoint.remote_folder import OPTION, WAITS, AbandonedError, RemoteFolder, one_line, url_problem
from sft_job.checkpoint.retention import Held, superfluous
from sft_job.checkpoint.state import STATE_FILE, TO_GO_ON
from sft_job.contract import ExitCode, RunFolder, step_of
from sft_job.errors import JobError, Problem, ProblemsError

LATEST = "latest"
FINAL = "final"
_PIN = ".uploading_"

Warn = Callable[[str], None]


class _GoneError(Exception):
    """The checkpoint was removed from the run folder before it could be read."""


@dataclass(frozen=True, eq=False)
class _Order:
    """One wish to have a checkpoint there; a second wish for the same step is another one."""

    folder: Path


class RemoteStore:
    """Uploads published checkpoints on a thread of its own; training never waits for it and never fails by it.

    The newest checkpoint goes first. One that the run's retention removes before its turn is left out; the one that
    is being sent is kept on the disk by hard links until it is there. What waits is never more than what the run
    folder holds.

    Args:
        url: ``trainer.default_hdfs_dir``.
        warn: takes the text of a warning, on any thread.
        keep: ``trainer.max_ckpt_to_keep``, which holds there too.
        waits: seconds before each further attempt of an operation.
    """

    def __init__(self, url: str, warn: Warn, keep: int | None = None, waits: Sequence[float] = WAITS) -> None:
        self._url = url.rstrip("/")
        self._warn = warn
        self._keep = keep
        self._waits = waits
        self._abandoned = threading.Event()
        self._changed = threading.Condition()
        self._orders: dict[int, _Order] = {}
        self._failed: dict[int, str] = {}  # step -> why; tried again with the next order
        self._closing = False
        self._outage = False
        self._held: dict[int, Held] = {}  # steps that are there, as their state.json says
        self._newest_sent = -1
        self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def upload(self, folder: Path) -> None:
        """Ask for a published checkpoint to be copied; returns at once. One that is there already costs a look."""
        step = step_of(folder)
        if step is None:
            raise ValueError(f"{folder} is no checkpoint's name")
        with self._changed:
            self._orders[step] = _Order(folder)
            self._failed.clear()
            self._changed.notify()

    @property
    def waiting(self) -> list[str]:
        """Names of the checkpoints that are not there yet, oldest first."""
        with self._changed:
            return [order.folder.name for _, order in sorted(self._orders.items()) if order.folder.is_dir()]

    def close(self, timeout: float) -> bool:
        """Wait for what is not there yet, at most ``timeout`` seconds; a warning names what never came.

        Returns:
            True where every checkpoint that was asked for, and is still in the run folder, is there.
        """
        with self._changed:
            self._closing = True
            self._failed.clear()
            self._changed.notify()
        self._thread.join(timeout)
        self._abandoned.set()
        with self._changed:
            left = {step: order for step, order in sorted(self._orders.items()) if order.folder.is_dir()}
            reasons = dict(self._failed)
        if not left:
            return True
        names = ", ".join(order.folder.name for order in left.values())
        why = reasons.get(max(left), f"not done within {timeout:g} s")
        place = left[max(left)].folder.parent
        self._warn(f"{OPTION}: not at {self._url}: {names} ({why}); copy what you need from {place}")
        return False

    def _run(self) -> None:
        while (order := self._next()) is not None:
            try:
                self._serve(order)
            except AbandonedError:
                return
            except _GoneError:
                self._done(order)
            except Exception as error:  # whatever it is, training goes on
                self._note_failure(order, error)
            else:
                self._done(order)
                self._outage = False

    def _next(self) -> _Order | None:
        with self._changed:
            while True:
                ready = self._orders.keys() - self._failed.keys()
                if ready:
                    return self._orders[max(ready)]
                if self._closing:
                    return None
                self._changed.wait()

    def _done(self, order: _Order) -> None:
        with self._changed:
            step = step_of(order.folder) or 0
            if self._orders.get(step) is order:
                del self._orders[step]

    def _note_failure(self, order: _Order, error: Exception) -> None:
        with self._changed:
            self._failed[step_of(order.folder) or 0] = one_line(error)
        if not self._outage:
            self._outage = True
            self._warn(
                f"{OPTION}: {order.folder.name} could not be copied to {self._url}: {one_line(error)} "
                "(training goes on; it is tried again with the next checkpoint)"
            )

    def _serve(self, order: _Order) -> None:
        folder, step = order.folder, step_of(order.folder) or 0
        remote = RemoteFolder(self._url, self._waits, self._abandoned)
        self._held.pop(step, None)
        with _pinned(folder) as source:
            try:
                _send(remote, source, folder.name)
                self._held[step] = _held((source / STATE_FILE).read_bytes())
            except FileNotFoundError:
                if not source.is_dir():
                    raise _GoneError from None
                raise
        if step < self._newest_sent:  # an older one that was late
            return
        self._newest_sent = step
        remote.write(LATEST, folder.name.encode())
        final = RunFolder(folder.parents[1]).final
        if final.is_symlink() and final.readlink().name == folder.name:
            remote.write(FINAL, folder.name.encode())
        try:
            self._retain(remote, step)
        except AbandonedError:
            raise
        except Exception as error:
            self._warn(f"{OPTION}: old checkpoints at {self._url} could not be removed: {one_line(error)}")

    def _retain(self, remote: RemoteFolder, newest: int) -> None:
        """Remove what the run's retention would, of the checkpoints up to the newest one."""
        there = [step for step in remote.steps() if step <= newest]
        for step in there:
            if step not in self._held:
                name = RunFolder(Path()).step(step).name
                whole = remote.read(f"{name}/{MANIFEST}") is not None
                # What was never wholly sent is of no use: it is sent anew where it is still wanted.
                self._held[step] = _held(remote.read(f"{name}/{STATE_FILE}") or b"") if whole else Held(False, False)
        for step in superfluous({step: self._held[step] for step in there}, self._keep):
            remote.remove(RunFolder(Path()).step(step).name)
            del self._held[step]


def _held(state: bytes) -> Held:
    try:
        fields = json.loads(state)
        return Held(bool(fields["kept"]), set(fields["contents"]) >= TO_GO_ON)
    except (ValueError, KeyError, TypeError):
        return Held(kept=True, resumable=False)  # not to be understood: not ours to remove


@contextmanager
def _pinned(folder: Path) -> Iterator[Path]:
    """The checkpoint by other names of its files, which retention does not know; itself where there are no links."""
    for leftover in folder.parent.glob(f"{_PIN}*"):  # there is one upload at a time
        shutil.rmtree(leftover, ignore_errors=True)
    pin = folder.with_name(f"{_PIN}{folder.name}")
    try:
        try:
            shutil.copytree(folder, pin, symlinks=True, copy_function=os.link)
            source = pin
        except OSError:
            source = folder
        if not folder.is_dir() and source == folder:
            raise _GoneError
        yield source
    finally:
        shutil.rmtree(pin, ignore_errors=True)


def _send(remote: RemoteFolder, folder: Path, name: str) -> None:
    manifest = (folder / MANIFEST).read_bytes()
    if remote.read(f"{name}/{MANIFEST}") == manifest:
        return
    remote.remove(name)
    for file in files_below(folder):
        remote.put(folder / file, f"{name}/{file.as_posix()}")
    remote.write(f"{name}/{MANIFEST}", manifest)


def download_newest(url: str, run: RunFolder, warn: Warn, waits: Sequence[float] = WAITS) -> Path | None:
    """Bring the newest whole checkpoint into a run folder that has none.

    Args:
        url: ``trainer.default_hdfs_dir``.
        run: the run folder.
        warn: takes a line for each checkpoint that was passed over.
        waits: seconds before each further attempt of an operation.

    Returns:
        The published folder; None where the run folder has checkpoints of its own or nothing was ever uploaded.

    Raises:
        ProblemsError: the URL cannot be used (2).
        JobError: the store does not answer (137: starting over would be worse than trying again); it holds
            checkpoints and none is as its manifest says (74); the run folder cannot be written (73).
    """
    if published(run):
        return None
    if problem := url_problem(url):
        raise ProblemsError([problem])
    url = url.rstrip("/")
    damaged: list[str] = []
    try:
        remote = RemoteFolder(url, waits)
        for step in reversed(remote.steps()):
            name = run.step(step).name
            manifest = remote.read(f"{name}/{MANIFEST}")
            if manifest is None:
                warn(f"{url}/{name} was never wholly uploaded: not used")
                continue
            found = _download(remote, manifest, run, run.step(step))
            if found is None:
                if (remote.read(FINAL) or b"").decode().strip() == name:
                    mark_final(run, run.step(step))
                return run.step(step)
            damaged.append(f"{url}/{name}: damaged, not used ({found})")
            warn(damaged[-1])
    except JobError:
        raise
    except PermissionError as error:
        fix = "check the credentials and rights of this job"
        raise ProblemsError([Problem(ExitCode.CONFIG, OPTION, f"refused: {one_line(error)}", fix, url)]) from error
    except Exception as error:  # each file system has errors of its own
        raise JobError(
            ExitCode.LOST,
            f"{OPTION}: {url} cannot be read, and the run folder has no checkpoint: {one_line(error)}\n"
            f"    fix: run it again when it answers; to start over, remove {OPTION}",
        ) from error
    if damaged:
        raise JobError(ExitCode.NO_CHECKPOINT, "no uploaded checkpoint is usable:\n" + "\n".join(damaged))
    return None


def _download(remote: RemoteFolder, manifest: bytes, run: RunFolder, folder: Path) -> str | None:
    """Download, verify, publish; what is wrong with the checkpoint, None where all is well."""
    # A prefix that folder.clear_leftovers knows.
    temporary = run.checkpoints / f".saving_{uuid.uuid4().hex}_{folder.name}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        for name in _names(manifest):
            local = temporary / name
            local.parent.mkdir(parents=True, exist_ok=True)
            remote.get(f"{folder.name}/{name}", local)
        (temporary / MANIFEST).write_bytes(manifest)
        found = damage(temporary)
        if found or not (temporary / STATE_FILE).is_file():
            return found or f"{STATE_FILE} is missing"
        for path in (*temporary.rglob("*"), temporary):
            Files().fsync(path)
        temporary.rename(folder)
        write_durably(run.latest, folder.name)
    except FileNotFoundError as error:
        return f"missing: {error}"
    except ValueError as error:
        return f"{MANIFEST}: {error}"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise _unwritable(run, error) from error
        if not folder.is_dir():
            raise
        # Another node was faster with the same checkpoint.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


def _names(manifest: bytes) -> list[str]:
    """Names of a checkpoint's files; a manifest that leads out of its folder is damaged."""
    try:
        names = list(json.loads(manifest)["files"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"it lists no files: {error}") from error
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is not inside the checkpoint")
    return names


def _unwritable(run: RunFolder, error: OSError) -> JobError:
    return JobError(ExitCode.CANNOT_CREATE, f"{run.checkpoints}: cannot be written: {error.strerror or error}")
