"""Parquet files that the config names: finding them, and checking their footers and schemas.

Free of torch and transformers. Everything that is wrong is collected, so that one start shows all of it.
"""

from __future__ import annotations

import difflib
import glob
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_job.config.schema import JobConfig
from sft_job.config.sets import Split, check_sets, data_sets
from sft_job.contract import ExitCode
from sft_job.data.columns import Column, message_columns, own_options, plain, text_columns, type_fault
from sft_job.data.custom import custom_class
from sft_job.data.footer import UNREADABLE, Group, footer_fault, read_groups
from sft_job.errors import Problem, ProblemsError

_MAGIC = b"PAR1"
_LFS_POINTER = b"version https://git-lfs"
# Footers are small reads that wait for the disk, often a network one: far more threads than cores.
_THREADS = 32
_NAMED = 10


def resolve_files(value: Any, key: str) -> tuple[list[Path], list[Problem]]:
    """Files behind a file, a folder, a glob pattern or a list of these.

    A folder stands for its ``*.parquet`` files at any depth, sorted by path; names that start with ``.`` or ``_`` are
    left out (``.ipynb_checkpoints``, ``_temporary``). The files' contents are not looked at.

    Args:
        value: the option's value, plain or an OmegaConf list.
        key: the option's full path, for messages.

    Returns:
        The files in the order of the list, and what is wrong.
    """
    value = plain(value)
    entries = value if isinstance(value, list) else [value]
    if not entries or any(not isinstance(entry, str | os.PathLike) or not str(entry) for entry in entries):
        rule = "must be a parquet file, a folder, a glob pattern, or a list of these"
        return [], [Problem(ExitCode.CONFIG, key, rule, value=value)]
    files: list[Path] = []
    problems: list[Problem] = []
    for entry in entries:
        found = _resolve(str(entry), key)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            files += found
    return files, problems


def _resolve(entry: str, key: str) -> list[Path] | Problem:
    if "://" in entry:
        return Problem(
            ExitCode.DATA, key, "is not a local path", "copy the files here or mount the storage first", entry
        )
    path = Path(entry).expanduser()
    try:
        if path.is_dir():
            return _folder_files(path) or _empty_folder(path, key)
        if path.exists():
            return [path]
        if glob.has_magic(entry):
            return _glob_files(path) or _no_match(path, key)
    except OSError as error:
        return Problem(ExitCode.DATA, key, f"cannot be read: {error.strerror}: {error.filename}", value=entry)
    if path.is_symlink():
        return Problem(ExitCode.DATA, key, f"is a link to {path.readlink()}, which does not exist", value=entry)
    return Problem(ExitCode.DATA, key, f"does not exist; {_surroundings(path)}", _did_you_mean(path), entry)


def _folder_files(folder: Path) -> list[Path]:
    """Parquet files at any depth, links followed; folders that contain themselves through a link are entered once."""
    files: list[Path] = []
    entered: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        files += [Path(root, name) for name in names if name.endswith(".parquet") and not name.startswith((".", "_"))]
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def _glob_files(pattern: Path) -> list[Path]:
    files: list[Path] = []
    for match in sorted(glob.glob(str(pattern), recursive=True)):  # noqa: PTH207  Path.glob takes no absolute pattern
        path = Path(match)
        if path.is_dir():
            # Of a recursive pattern's folders the files match by themselves.
            files += [] if "**" in pattern.parts else _folder_files(path)
        else:
            files.append(path)
    return files


def _empty_folder(folder: Path, key: str) -> Problem:
    names = sorted(entry.name for entry in folder.iterdir())
    holds = f"it holds {_listing(names)}" if names else "it is empty"
    return Problem(ExitCode.DATA, key, f"folder without *.parquet files: {holds}", value=str(folder))


def _no_match(pattern: Path, key: str) -> Problem:
    fixed = Path(*_before_magic(pattern.parts))
    return Problem(ExitCode.DATA, key, f"no file matches the pattern; {_surroundings(fixed)}", value=str(pattern))


def _before_magic(parts: Iterable[str]) -> Iterable[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def _surroundings(path: Path) -> str:
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError as error:
        return f"the nearest existing folder, {parent}, cannot be read: {error.strerror}"
    return f"the nearest existing folder is {parent}, which holds {_listing(names) if names else 'nothing'}"


def _did_you_mean(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else ""


def _listing(names: Sequence[str], shown: int = _NAMED) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest:,} more" if rest > 0 else "")


@dataclass(frozen=True)
class FileFault:
    """What is wrong with one file; equal faults of several files are shown as one problem."""

    subject: str
    rule: str
    fix: str = ""


@dataclass(frozen=True)
class FileFooter:
    """What a file's footer says.

    Attributes:
        rows: rows in the file.
        text_bytes: uncompressed size of the columns that are read, an estimate of the text in them.
        faults: what is wrong; empty = the file can be read.
    """

    rows: int = 0
    text_bytes: int = 0
    faults: tuple[FileFault, ...] = ()


def read_footers(files: Sequence[Path], columns: Sequence[Column], key: str) -> list[FileFooter]:
    """Footer and schema of each file, read by a pool of threads. No data page is looked at."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda file: _read_footer(file, columns, key), files))


def check_files(files: Sequence[Path], columns: Sequence[Column], key: str) -> list[Problem]:
    """What is wrong with the files' footers and schemas; files at fault in the same way share a problem.

    Args:
        files: as ``resolve_files`` found them.
        columns: columns that every file must hold, but for optional ones.
        key: the option that names the files.
    """
    return footer_problems(files, read_footers(files, columns, key), key)


def footer_problems(files: Sequence[Path], footers: Sequence[FileFooter], key: str) -> list[Problem]:
    """Problems for what ``read_footers`` found."""
    by_fault: defaultdict[FileFault, list[Path]] = defaultdict(list)
    good = 0
    for file, footer in zip(files, footers, strict=True):
        good += not footer.faults
        for fault in footer.faults:
            by_fault[fault].append(file)
    problems = [_fault_problem(fault, at_fault, good, key) for fault, at_fault in by_fault.items()]
    if files and not problems and not any(footer.rows for footer in footers):
        where = str(files[0]) if len(files) == 1 else f"{len(files):,} files, the first one {files[0]}"
        problems.append(Problem(ExitCode.DATA, key, f"no rows at all in {where}"))
    return problems


def _fault_problem(fault: FileFault, files: Sequence[Path], good: int, key: str) -> Problem:
    if fault.subject == key:
        subject = f"{key}: {files[0]}" if len(files) == 1 else f"{key}: {len(files):,} files"
    else:
        subject = fault.subject
    where = "" if fault.subject == key and len(files) == 1 else f"\n    in {_listing([str(file) for file in files])}"
    rest = f"\n    the other {good:,} file{' is' if good == 1 else 's are'} good" if good else ""
    return Problem(ExitCode.DATA, subject, f"{fault.rule}{where}{rest}", fault.fix)


def _read_footer(file: Path, columns: Sequence[Column], key: str) -> FileFooter:
    try:
        if fault := _not_parquet(file, key):
            return FileFooter(faults=(fault,))
        with pq.ParquetFile(file) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
        groups = read_groups(file)
        if rule := footer_fault(metadata, groups, file.stat().st_size):
            return FileFooter(faults=(FileFault(key, f"is damaged: {rule}", "copy it again"),))
        faults = _schema_faults(schema, columns, key)
        return FileFooter(metadata.num_rows, _text_bytes(groups, columns), tuple(faults))
    except UNREADABLE as error:
        return FileFooter(faults=(FileFault(key, f"cannot be read as parquet: {_first_line(error)}"),))


def _not_parquet(file: Path, key: str) -> FileFault | None:
    """The plain reasons why a file is no parquet file, in plain words."""
    kind = file.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        return FileFault(key, "is no regular file: a device or a pipe has no end to read from", "name a parquet file")
    with file.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - len(_MAGIC)))
        tail = stream.read()
    if size == 0:
        return FileFault(key, "is empty: 0 bytes")
    if head == _LFS_POINTER:
        return FileFault(key, "is a Git LFS pointer, not the data", "git lfs pull")
    if not head.startswith(_MAGIC):
        return FileFault(key, f"is not a parquet file: it begins with {head[:4]!r}, expected {_MAGIC!r}")
    if tail != _MAGIC:
        return FileFault(key, "is cut off or damaged: the end mark of a parquet file is missing", "copy it again")
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _schema_faults(schema: pa.Schema, columns: Sequence[Column], key: str) -> list[FileFault]:
    if not schema.names:
        return [FileFault(key, "has no columns")]
    faults: list[FileFault] = []
    for column in columns:
        indices = schema.get_all_field_indices(column.name)
        if not indices and column.optional:
            continue
        if not indices:
            rule = f"no column {column.name!r}; found {_listing(schema.names, 20)}"
            faults.append(FileFault(column.option, rule, _did_you_mean_name(column.name, schema.names)))
        elif len(indices) > 1:
            faults.append(FileFault(column.option, f"{len(indices)} columns are called {column.name!r}"))
        elif fault := type_fault(column, schema.field(indices[0]).type):
            rule = f"{fault.rule}; found {', '.join(fault.choices)}" if fault.choices else fault.rule
            fix = _did_you_mean_name(fault.path.rpartition(".")[2], fault.choices)
            faults.append(FileFault(fault.option, rule, fix))
    return list(dict.fromkeys(faults))


def _did_you_mean_name(name: str, names: Sequence[str]) -> str:
    by_folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f"did you mean {by_folded[close[0]]!r}?" if close else ""


def _text_bytes(groups: Sequence[Group], columns: Sequence[Column]) -> int:
    names = {column.name for column in columns}
    return sum(chunk.text_bytes for group in groups for chunk in group.chunks if chunk.path[0] in names)


def check_data(config: JobConfig) -> list[Problem]:
    """What is wrong with the training and validation files, by their paths, footers and schemas alone.

    With a data set class of the user's own, the paths and the class's file: what is in the files is the class's matter.
    A split whose named sets have faulty settings is not looked at.
    """
    problems: list[Problem] = []
    by_class = True
    try:
        by_class = custom_class(config.data) is not None
    except ProblemsError as error:
        problems += error.problems
    faulty = check_sets(config, lambda _: "")
    splits: tuple[Split, Split] = ("train", "val")
    for split in splits:
        if any(problem.subject.startswith(f"data.{split}_files") for problem in faulty):
            continue
        for each in data_sets(config.data, split):
            prompt, response = text_columns(each.data)
            columns = message_columns(each.data) or (*prompt, *response)
            files, not_found = resolve_files(each.entry.files, each.option)
            problems += not_found
            if not by_class:
                problems += check_files(files, own_options(columns, each), each.option)
    return problems
