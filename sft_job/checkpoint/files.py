"""The file operations of saving, in one place that a test can watch, slow down, or let fail. Torch-free.

Everything that a save does to the disk passes through one ``Files`` object: shards, manifest, pointer, retention. (The
export's own files are written by safetensors and the tokenizer; their fsync comes through here.) A test that wants to
kill a rank at its seventh fsync, or to fill the disk at a tenth of a shard, gives a subclass whose ``before`` does so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Operation = Literal["open", "write", "fsync", "rename", "mkdir", "remove", "link"]
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Content:
    """What a file holds, as a manifest says it."""

    bytes: int
    sha256: str


class HashedStream:
    """A file that is being written, hashed on its way: the sum is that of what was meant to be written.

    Args:
        files: whose operations these are.
        path: made anew.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._sum = hashlib.sha256()
        self._bytes = 0
        files.before("open", path)
        self._file = path.open("wb")

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append; how many bytes that were."""
        self._files.before("write", self._path)
        count = self._file.write(data)
        self._sum.update(data)
        self._bytes += count
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand to the system what is buffered."""
        self._file.flush()

    def fileno(self) -> int:
        """Descriptor of the file."""
        return self._file.fileno()

    def close(self) -> None:
        """Does nothing: the block that opened the file makes it durable and closes it."""

    def end(self) -> None:
        """Close it for good."""
        self._file.close()

    @property
    def content(self) -> Content:
        """What was written so far."""
        return Content(self._bytes, self._sum.hexdigest())


class Files:
    """File operations; ``before`` sees each one first."""

    def before(self, operation: Operation, path: Path) -> None:
        """Called before every operation that changes the disk, on the thread that does it; does nothing.

        Args:
            operation: what is about to happen.
            path: to which file or folder; of a rename, the new name.
        """

    @contextmanager
    def writing(self, path: Path) -> Iterator[HashedStream]:
        """A new file, durable when the block ends without an error."""
        stream = HashedStream(self, path)
        try:
            yield stream
            stream.flush()
            self.before("fsync", path)
            os.fsync(stream.fileno())
        finally:
            stream.end()

    def fsync(self, path: Path) -> None:
        """Make a file's bytes, or a folder's list of names, survive a power cut."""
        self.before("fsync", path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, target: Path) -> None:
        """Give a file or folder another name; of a file that has the name already, take its place at once."""
        self.before("rename", target)
        path.replace(target)

    def mkdir(self, path: Path) -> None:
        """Make a folder, and those above it."""
        self.before("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def link(self, path: Path, target: str) -> None:
        """Make a symbolic link."""
        self.before("link", path)
        path.symlink_to(target)

    def remove(self, path: Path) -> None:
        """Remove a file, a link (never what it points at) or a folder with all that is in it; nothing is fine too."""
        self.before("remove", path)
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the file system of a folder."""
        return shutil.disk_usage(path).free

    def read_back(self, path: Path) -> Content:
        """What a file really holds: asks the disk rather than the page cache, where the system can be told so."""
        total, found = 0, hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            buffer = bytearray(_READ_BYTES)
            while count := file.readinto(buffer):
                found.update(memoryview(buffer)[:count])
                total += count
        return Content(total, found.hexdigest())


def write_durably(path: Path, text: str, files: Files | None = None) -> None:
    """Replace a small file at once: temporary name, fsync, rename, fsync of the folder."""
    files = files or Files()
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.is_symlink():
        files.remove(temporary)  # never write through somebody's link
    with files.writing(temporary) as file:
        file.write(text.encode("utf-8"))
    files.rename(temporary, path)
    files.fsync(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
