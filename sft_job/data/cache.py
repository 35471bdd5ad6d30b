"""The token cache: tokens of all usable rows of a split, memory-mapped, built once and shared by all who need it.

A cache is a folder, named by what it holds: parts (Arrow IPC files with ids and trained spans), the rows' lengths and
numbers of targets as plain int32 files, their hashes, a table of the rows that are not trained on and why, and a
manifest with every file's size. It is published by one rename.

It does not depend on how many rows may be rejected: ``judge.judge_rows`` says whether a run may use it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_job.data.build import (
    FORMAT,
    HASHES,
    LENGTHS,
    MANIFEST,
    REJECTED,
    TARGETS,
    Progress,
    build,
    library_versions,
    unwritable,
)
from sft_job.data.faults import FaultLog
from sft_job.data.spec import CacheSpec, cache_spec
from sft_job.data.tokenise import PART_SCHEMA, Int32

__all__ = [
    "CacheSpec",
    "DamagedCacheError",
    "TokenCache",
    "TokenRow",
    "cache_spec",
    "find_cache",
    "open_cache",
    "open_or_build",
]

# Mapped pages count as this process's memory once they were read: beyond this much, the parts that were not used for
# the longest time are let go. They stay in the system's page cache.
_MAPPED_BYTES = 512 << 20
_LOCK_POLL_SECONDS = 1.0
_NAMED = 10
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@dataclass(frozen=True)
class TokenRow:
    """One row.

    Attributes:
        ids: [tokens] int32, a read-only view of the cache.
        trained: [tokens] bool, True where the token is trained. At position 0 it has no effect: nothing predicts it.
    """

    ids: Int32
    trained: npt.NDArray[np.bool_]


class DamagedCacheError(Exception):
    """The folder holds no whole cache."""


class TokenCache:
    """Rows of one split. Opening reads a few numbers a part; rows are read when they are asked for.

    Attributes:
        folder: where it lies.
        fingerprint: ``CacheSpec.fingerprint`` of what it was made from.
        files: files that the rows came from: parquet, or the Python file of the user's class.
        num_rows: usable rows.
        lengths: [rows] int32, tokens of each row.
        targets: [rows] int32, trained tokens of each row from position 1 on: what the loss is made of.
        report: counts of rows and tokens, in all and for each file; notes and warnings for the log.
        faults: counts and first examples of the rows that are not trained on, by the index of the file.
        rejected: parquet file with all of them (``rejected.CACHED``).
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        """Open a published cache.

        Args:
            folder: its folder.
            files: today's paths of the files that it was made from; None = the paths at that time.

        Raises:
            DamagedCacheError: a file is missing, has another size or cannot be read.
        """
        try:
            self._open(folder, files)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DamagedCacheError(f"{folder}: {error}") from error

    def _open(self, folder: Path, files: Sequence[Path] | None) -> None:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
        self.folder = folder
        self.fingerprint: str = manifest["fingerprint"]
        self.num_rows: int = manifest["rows"]
        self.files = tuple(files) if files is not None else tuple(Path(file) for file in manifest["files"])
        self.report: dict[str, Any] = dict(manifest["report"])
        counts = zip(self.files, self.report["files"], strict=True)
        self.report["files"] = [{"path": str(file), **of_file} for file, of_file in counts]
        bare = [of_file["path"] for of_file in self.report["files"] if of_file["checksums"] is False]
        self.report["files_without_checksums"] = {"count": len(bare), "first": bare[:_NAMED]}
        self.faults = FaultLog.from_json(manifest["faults"])
        self.rejected = _checked(folder / REJECTED, manifest["rejected_bytes"])
        _checked(folder / HASHES, 16 * self.num_rows)
        self._parts: list[Path] = []
        for part in manifest["parts"]:
            self._parts.append(_checked(folder / part["name"], part["size"]))
            _Part(self._parts[-1], part["rows"])
        # [parts + 1]: number of the first row of each part, and of all rows.
        self._starts = np.cumsum([0, *(part["rows"] for part in manifest["parts"])])
        if self._starts[-1] != self.num_rows:
            raise ValueError("the parts do not hold all rows")
        self.lengths = self._numbers(LENGTHS)
        self.targets = self._numbers(TARGETS)
        self._mapped: OrderedDict[int, _Part] = OrderedDict()
        self._mapping = Lock()

    def _numbers(self, name: str) -> Int32:
        path = _checked(self.folder / name, 4 * self.num_rows)
        if not self.num_rows:  # nothing can be mapped
            return np.zeros(0, dtype=np.int32)
        return np.asarray(np.memmap(path, dtype=np.int32, mode="r"))

    def __len__(self) -> int:
        return self.num_rows

    def row(self, index: int) -> TokenRow:
        """Tokens of a usable row, by its number from 0. Any thread may call this."""
        part, local = self._locate(index)
        ids = part.ids[part.id_offsets[local] : part.id_offsets[local + 1]]
        spans = part.spans[part.span_offsets[local] : part.span_offsets[local + 1]]
        trained = np.zeros(len(ids), dtype=np.bool_)
        for start, end in spans.reshape(-1, 2):
            trained[start:end] = True
        return TokenRow(ids, trained)

    def origin(self, index: int) -> tuple[Path, int]:
        """Where a usable row came from: its file, and its number in that file from 0."""
        part, local = self._locate(index)
        return self.files[part.files[local]], int(part.rows[local])

    def find(self, file: Path, number: int) -> list[int]:
        """Usable rows that came from a row of a file: one, none, or several where the file is listed more than once."""
        files = [place for place, path in enumerate(self.files) if path == file]
        found: list[int] = []
        for start in self._starts[:-1].tolist():
            part, _ = self._locate(start)
            found += (start + np.flatnonzero((part.rows == number) & np.isin(part.files, files))).tolist()
        return found

    def _locate(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        with self._mapping:
            part = self._mapped.get(number)
            if part is None:
                rows = int(self._starts[number + 1] - self._starts[number])
                part = self._mapped[number] = _Part(self._parts[number], rows)
                while len(self._mapped) > 1 and sum(old.size for old in self._mapped.values()) > _MAPPED_BYTES:
                    self._mapped.popitem(last=False)
            self._mapped.move_to_end(number)
        return part, int(index - self._starts[number])


def _checked(path: Path, size: int) -> Path:
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"{path.name} has {found} bytes, expected {size}")
    return path


class _Part:
    """Arrays over one memory-mapped part; the mapping lives as long as any view of them."""

    def __init__(self, path: Path, rows: int) -> None:
        # Closing the file leaves the mapping: no file descriptor is held, however many parts there are.
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            if not reader.schema.equals(PART_SCHEMA) or reader.num_record_batches != 1:
                raise ValueError(f"{path.name} is not a part of a token cache")
            batch = reader.get_batch(0)
        if batch.num_rows != rows:
            raise ValueError(f"{path.name} has {batch.num_rows} rows, expected {rows}")
        self.size = batch.nbytes
        ids, spans, files, numbers = batch.columns
        self.ids: Int32 = ids.values.to_numpy()
        self.id_offsets: npt.NDArray[np.int64] = ids.offsets.to_numpy()
        self.spans: Int32 = spans.values.to_numpy()
        self.span_offsets: npt.NDArray[np.int64] = spans.offsets.to_numpy()
        self.files: Int32 = files.to_numpy()
        self.rows: npt.NDArray[np.int64] = numbers.to_numpy()


def open_cache(folder: Path) -> TokenCache:
    """Open a published cache by its folder (``TokenCache.folder``), without looking at the files it was made from.

    Raises:
        DamagedCacheError: it is not whole.
    """
    return TokenCache(folder)


def open_or_build(spec: CacheSpec, folder: Path, workers: int, progress: Progress | None = None) -> TokenCache:
    """The cache for ``spec`` in ``folder``, built where there is none or a damaged one.

    It is built and published whatever rows cannot be used, even without any usable row: ask ``judge.judge_rows``.
    Several processes may call this at once, on one machine or on one file system: one builds, the others wait for it.

    Args:
        spec: what the cache is made from.
        folder: holds the caches, and may be shared by many runs.
        workers: processes that tokenise; small data is tokenised in this process.
        progress: called with rows done and rows in all; with 0 and 0 once a second while another process builds. An
            exception from it ends the building.

    Raises:
        ProblemsError: exit 65, 66 or 2 for what is wrong with files, tokenizer or template; 73 for the cache's folder.
        JobError: exit 137, where a worker process was killed.
    """
    fingerprint = spec.fingerprint()
    final = folder / _name(spec, fingerprint)
    cache = _published(final, spec)
    if cache:
        return cache
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{final.name}.lock", progress) as alone:
            cache = _published(final, spec)
            if cache:
                return cache
            if alone:  # what builders that were killed left behind
                for leftover in folder.glob(f".{final.name}.old-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            _build_and_publish(spec, final, fingerprint, workers, progress)
    except OSError as error:
        if error.errno in _UNWRITABLE:
            raise unwritable(folder, error) from error
        raise
    return TokenCache(final, spec.origins)


def find_cache(spec: CacheSpec, folder: Path) -> TokenCache | None:
    """The cache for ``spec`` where it is in ``folder`` already; None else. Reads all of the data's files once.

    Raises:
        ProblemsError: as ``CacheSpec.fingerprint`` says.
    """
    return _published(folder / _name(spec, spec.fingerprint()), spec)


def _name(spec: CacheSpec, fingerprint: str) -> str:
    versions = json.dumps(library_versions(), sort_keys=True)
    return f"{spec.split}-{hashlib.sha256(f'{FORMAT} {fingerprint} {versions}'.encode()).hexdigest()[:24]}"


def _published(final: Path, spec: CacheSpec) -> TokenCache | None:
    try:
        return TokenCache(final, spec.origins)
    except DamagedCacheError:
        return None


def _build_and_publish(spec: CacheSpec, final: Path, fingerprint: str, workers: int, progress: Progress | None) -> None:
    # The same prefix for all that is unfinished or replaced, so that the next builder finds and removes it.
    aside = final.parent / f".{final.name}.old-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        building, damaged = aside / "building", aside / "damaged"
        building.mkdir()
        build(spec, building, fingerprint, workers, progress)
        if final.exists() and _published(final, spec) is None:
            final.rename(damaged)
        try:
            building.rename(final)
        except OSError as error:
            # Without locks another builder may have been faster; its cache holds the same.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(path: Path, progress: Progress | None) -> Iterator[bool]:
    """Holds the lock; yields False on a file system that has none: then each builds, and the first to rename wins."""
    lock = filelock.FileLock(path)
    try:
        held = _acquire(lock, progress)
    except NotImplementedError:
        held = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        held = False
    try:
        yield held
    finally:
        if held:
            lock.release()


def _acquire(lock: filelock.BaseFileLock, progress: Progress | None) -> bool:
    while True:
        try:
            lock.acquire(timeout=_LOCK_POLL_SECONDS)
        except filelock.Timeout:
            if progress:
                progress(0, 0)
        else:
            return True
