"""The list of a checkpoint's files with size and SHA-256, and what it proves.

Torch-free.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from sft_job.checkpoint.files import Content, Files, file_sha256, write_durably
from sft_job.checkpoint.state import STATE_FILE

MANIFEST = "manifest.json"
INDEX = ".metadata"
"""DCP's index of the shards: a pickle, so it must stand in the manifest."""


def files_below(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, relative to it, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.relative_to(folder) for path in found if path != folder / MANIFEST)


def write_manifest(folder: Path, known: Mapping[str, Content], files: Files) -> None:
    """Write down what a checkpoint consists of, and make every file of it durable.

    Args:
        folder: the checkpoint's.
        known: files that are durable already and whose content is known, by name relative to the folder; the others
            are read here.
        files: does the file operations.
    """
    names = [name for name in files_below(folder) if str(name) not in known]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _durable_content(folder / name, files), names)
        entries = dict(known) | dict(zip(map(str, names), found, strict=True))
    text = json.dumps({"files": {name: asdict(entries[name]) for name in sorted(entries)}}, indent=1)
    write_durably(folder / MANIFEST, text, files)


def _durable_content(path: Path, files: Files) -> Content:
    files.fsync(path)
    return Content(path.stat().st_size, file_sha256(path))


@dataclass(frozen=True)
class Harm:
    """What is wrong with a file; proven, or it could only not be read."""

    text: str
    proven: bool = True

    @classmethod
    def of(cls, name: str, error: OSError) -> Harm:
        """What an error in reading a file says about it."""
        gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return cls(f"{name}: missing" if gone else f"{name}: cannot be read: {error.strerror or error}", gone)


def damage(folder: Path, *, sums: bool = True) -> str | None:
    """What is wrong with a checkpoint by its manifest: the first bad file and why; None where it is whole.

    Args:
        folder: of the checkpoint.
        sums: read every file; otherwise only names and sizes are compared.
    """
    harm = harm_of(folder, sums=sums)
    return None if harm is None else harm.text


def harm_of(folder: Path, *, sums: bool = True) -> Harm | None:
    """As ``damage``: the first proven harm; where there is none, the first file that cannot be read."""
    try:
        if stat.S_ISLNK(folder.lstat().st_mode):
            return Harm("it is a link")
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        parsed = {str(name): Content(int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except OSError as error:
        return Harm.of(MANIFEST, error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Harm(f"{MANIFEST}: {error}")
    for name in (STATE_FILE, INDEX):
        # What the manifest does not speak of is not proved by it.
        if name not in parsed and os.path.lexists(folder / name):
            return Harm(f"{name}: not in {MANIFEST}")
    found = [harm for name, content in parsed.items() if (harm := _harm_by_size(folder, name, content)) is not None]
    if sums and not found:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = list(filter(None, pool.map(lambda item: _harm_by_sum(folder, *item), parsed.items())))
    return next((harm for harm in found if harm.proven), found[0] if found else None)


def _harm_by_size(folder: Path, name: str, content: Content) -> Harm | None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return Harm(f"{MANIFEST}: {name!r} is not inside the checkpoint")
    try:
        status = (folder / name).lstat()
    except OSError as error:
        return Harm.of(name, error)
    if not stat.S_ISREG(status.st_mode):
        return Harm(f"{name}: {'a link' if stat.S_ISLNK(status.st_mode) else 'missing'}")
    return (
        Harm(f"{name}: {status.st_size} bytes instead of {content.bytes}") if status.st_size != content.bytes else None
    )


def _harm_by_sum(folder: Path, name: str, content: Content) -> Harm | None:
    try:
        found = file_sha256(folder / name)
    except OSError as error:
        return Harm.of(name, error)
    return Harm(f"{name}: its content has changed since it was saved") if found != content.sha256 else None


def changed_on_disk(folder: Path, known: Mapping[str, Content], files: Files) -> str | None:
    """Read files back: the first one that is not what was written, and why; None where all are."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name, found in zip(known, pool.map(lambda name: files.read_back(folder / name), known), strict=True):
            if found != known[name]:
                return f"{name}: what the disk gives back is not what was written"
    return None
