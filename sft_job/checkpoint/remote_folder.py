"""A folder behind fsspec, with the few operations that a store of checkpoints needs. Torch-free."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec.core

from sft_job.checkpoint.manifest import MANIFEST
from sft_job.contract import ExitCode, step_of
from sft_job.errors import Problem

OPTION = "trainer.default_hdfs_dir"
# Seconds before the second, third and fourth attempt of one operation.
WAITS = (1.0, 4.0, 16.0)
# An attempt that failed with one of these fails again.
_LASTING = (FileNotFoundError, PermissionError, NotImplementedError, ImportError, ValueError)

_T = TypeVar("_T")


def url_problem(url: str) -> Problem | None:
    """Why nothing can ever be written there: the protocol is not known, or its package is not installed."""
    try:
        fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, TypeError) as error:
        fix = "install what it needs in the image (s3fs for s3://, gcsfs for gs://), or name another folder"
        return Problem(ExitCode.CONFIG, OPTION, f"cannot be used: {one_line(error)}", fix, url)
    except Exception:  # some file systems connect at once: an outage is for the attempts to find
        return None
    return None


class AbandonedError(Exception):
    """The wait for the uploads is over."""


class RemoteFolder:
    """The few operations that a store of checkpoints needs, each one tried several times.

    Args:
        url: URL or path of the folder; it need not exist.
        waits: seconds before each further attempt.
        abandoned: once set, every operation raises instead of trying.

    Raises:
        Exception: whatever the file system raises, when its attempts are used up; the same for every method.
    """

    def __init__(self, url: str, waits: Sequence[float] = WAITS, abandoned: threading.Event | None = None) -> None:
        self._waits = waits
        self._abandoned = abandoned or threading.Event()
        fs, root = fsspec.core.url_to_fs(url)
        self._fs: Any = fs
        self._root = str(root).rstrip("/")

    def steps(self) -> list[int]:
        """Steps of the checkpoints, whole or not, in order."""
        entries = self._attempt(self._listing)
        steps = (step_of(Path(str(entry["name"]).rstrip("/"))) for entry in entries)
        return sorted(step for step in steps if step is not None)

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        try:
            return self._attempt(lambda: self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self._attempt(lambda: self._fs.pipe_file(self._below(name), content))

    def put(self, local: Path, name: str) -> None:
        """Copy a file there."""

        def copy() -> None:
            path = self._below(name)
            self._fs.put_file(str(local), path)
            size, found = local.stat().st_size, self._fs.size(path)
            if size != found:
                raise OSError(f"{path} has {found} bytes instead of {size}")

        self._attempt(copy)

    def get(self, name: str, local: Path) -> None:
        """Copy a file here."""
        self._attempt(lambda: self._fs.get_file(self._path(name), str(local)))

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first: a half-removed one is no longer one."""
        for path in (self._path(f"{name}/{MANIFEST}"), self._path(name)):
            self._attempt(lambda path=path: self._remove(path))

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)

    def _listing(self) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()
        try:
            return self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _below(self, name: str) -> str:
        """The path of a file that is about to be written; its folder is made."""
        path = self._path(name)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def _attempt(self, call: Callable[[], _T]) -> _T:
        for wait in (*self._waits, None):
            if self._abandoned.is_set():
                raise AbandonedError
            try:
                return call()
            except _LASTING:
                raise
            except Exception:  # each file system has errors of its own
                if wait is None:
                    raise
                self._abandoned.wait(wait)
        raise AssertionError("the last attempt returns or raises")


def one_line(error: BaseException) -> str:
    """An error as a line of a message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
