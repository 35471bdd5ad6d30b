"""Copies of files and folders in shared memory, made once on a node and used by all its processes and later runs.

Torch-free. A copy is an optimisation: whatever goes wrong, the original is used and a warning says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from sft_job.processes import host_room

SHM = Path("/dev/shm")
STALE_SECONDS = 24 * 3600.0
_COPYING = ".copying-"
# Of the file system: NCCL and others need shared memory too.
_RESERVED_SHARE = 0.1

Warn = Callable[[str], None]


@dataclass(frozen=True)
class _Source:
    """A file to copy: where it lies, its place in the copy, and what shows that it has changed."""

    path: Path
    place: str
    size: int
    mtime_ns: int


def to_shm(paths: Sequence[Path], root: Path = SHM, warn: Warn | None = None) -> list[Path]:
    """Copies of these files and folders, all of them or none; the originals where they do not fit.

    Any number of processes may call this at once: one copies, the others wait for it. A copy is found again as long
    as paths, sizes and times of its files are the same. Hidden files of a folder are left out.

    Args:
        paths: files and folders, on whatever file system.
        root: where shared memory is mounted.
        warn: takes the text of a warning; by default this package's Python logger.

    Returns:
        As many paths as were given, in their order and with their names.
    """
    warn = warn or logging.getLogger("sft_job").warning
    try:
        sources = _sources(paths)
        home = _home(root)
        key = hashlib.sha256(
            json.dumps([(str(s.path.absolute()), s.place, s.size, s.mtime_ns) for s in sources]).encode()
        ).hexdigest()[:24]
        entry = home / key
        with _lock(home, key):
            if not entry.is_dir():
                clean_stale(root)
                size, room = sum(source.size for source in sources), _room(root)
                if size > room:
                    warn(
                        f"use_shm: {_gib(size)} ({_named(paths)}) do not fit into the {_gib(max(0, room))} that {root} "
                        "and this machine's memory have to spare: read where they are"
                    )
                    return list(paths)
                _copy(paths, sources, entry)
            os.utime(entry)  # its last use
    except OSError as error:
        warn(f"use_shm: {_named(paths)} cannot be copied to {root}: {error}: read where they are")
        return list(paths)
    return [entry / str(index) / path.name for index, path in enumerate(paths)]


def clean_stale(root: Path = SHM, seconds: float = STALE_SECONDS) -> list[Path]:
    """Remove this user's copies that nobody asked for in so many seconds, and what killed processes left half done.

    Files that a process has open or mapped stay readable to it. A copy that is being made is not touched.

    Returns:
        What was removed.
    """
    home = _home(root)
    removed: list[Path] = []
    for path in sorted(home.iterdir()):
        if not _is_stale(path, seconds):
            continue
        try:
            with _lock(home, path.name.removeprefix(_COPYING), wait=0):
                if _is_stale(path, seconds):  # still: nobody asked for it meanwhile
                    shutil.rmtree(path, ignore_errors=True)
                    removed.append(path)
        except filelock.Timeout:
            continue
    return removed


def _is_stale(path: Path, seconds: float) -> bool:
    if not path.is_dir():  # a lock, or removed meanwhile
        return False
    return path.name.startswith(_COPYING) or path.stat().st_mtime < time.time() - seconds


def _sources(paths: Sequence[Path]) -> list[_Source]:
    """Every file, in a stable order.

    Raises:
        OSError: one is missing or cannot be looked at.
    """
    sources: list[_Source] = []
    for index, path in enumerate(paths):
        files = sorted(_visible(path)) if path.is_dir() else [path]
        for file in files:
            info = file.stat()
            place = Path(str(index), path.name, file.relative_to(path)) if file != path else Path(str(index), path.name)
            sources.append(_Source(file, str(place), info.st_size, info.st_mtime_ns))
    return sources


def _visible(folder: Path) -> Iterator[Path]:
    """Files of a folder, those behind links too: folders from the hub are made of links."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _home(root: Path) -> Path:
    """This user's folder; made where it is missing.

    Raises:
        OSError: it cannot be made, or someone else made it.
    """
    home = root / f"sft_job-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    info = home.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise PermissionError(f"{home} belongs to another user")
    return home


def _lock(home: Path, key: str, wait: float = -1) -> filelock.BaseFileLock:
    return filelock.FileLock(home / f".{key}.lock", timeout=wait)


def _copy(paths: Sequence[Path], sources: Sequence[_Source], entry: Path) -> None:
    unfinished = entry.with_name(f"{_COPYING}{entry.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for index, path in enumerate(paths):
            (unfinished / str(index) / (path.name if path.is_dir() else "")).mkdir(parents=True, exist_ok=True)
        for source in sources:
            target = unfinished / source.place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path, target)
        if _sources(paths) != list(sources):
            raise OSError("the files changed while they were copied")
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _room(root: Path) -> int:
    """Bytes that may be copied: what the file system has left but a tenth of it, and half of the free memory."""
    usage = shutil.disk_usage(root)
    room = int(usage.free - _RESERVED_SHARE * usage.total)
    memory = host_room()
    return room if memory is None else min(room, memory // 2)


def _named(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths):,} files"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
