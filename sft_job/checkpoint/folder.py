"""Checkpoints as folders: published by rename, named by ``latest``, proved by a manifest, pruned when old.

Torch-free. A folder named ``global_step_N`` is whole or it is damaged: a half-written one never gets that name.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from sft_job.checkpoint.files import Content, Files
from sft_job.checkpoint.retention import Held, superfluous
from sft_job.checkpoint.state import STATE_FILE, RunState, read_state
from sft_job.contract import RunFolder, step_of

MANIFEST = "manifest.json"
INDEX = ".metadata"
"""DCP's index of the shards: a pickle, so it must stand in the manifest."""
UNREAD = "unread_"
"""Begins the name of a checkpoint that could not be read when the run went on without it; nothing removes it."""
_SAVING, _PRUNED, _REPLACED = ".saving_", ".pruned_", ".replaced_"


def temporary_folder(run: RunFolder, step: int, token: str) -> Path:
    """Where the checkpoint of a step is written before it is published.

    Args:
        run: the run folder.
        step: the step.
        token: of the start that writes it, so that no other start writes there, not even one that was taken for dead.
    """
    return run.checkpoints / f"{_SAVING}{token}_{run.step(step).name}"


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's list of names, survive a power cut."""
    Files().fsync(path)


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


def files_below(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, relative to it, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.relative_to(folder) for path in found if path != folder / MANIFEST)


def publish(
    run: RunFolder,
    step: int,
    temporary: Path,
    known: Mapping[str, Content] | None = None,
    confirm: Callable[[], None] | None = None,
    files: Files | None = None,
) -> Path:
    """Give a finished temporary folder its name, then let ``latest`` point at it.

    Writes the manifest, makes every file durable, renames, and only then moves the pointer: whatever instant the
    process dies at, ``latest`` names a whole checkpoint.

    Args:
        run: the run folder.
        step: whose checkpoint it is.
        temporary: holds it.
        known: files that are durable already and whose content is known, by name relative to the folder; the others
            are read here.
        confirm: called immediately before the checkpoint gets its name; what it raises leaves all as it was.
        files: does the file operations.

    Raises:
        OSError: the disk refused, a link stands where the folder should be, or a known file is not there.
    """
    files = files or Files()
    known = known or {}
    folder = run.step(step)
    refuse_link(folder)
    names = [name for name in files_below(temporary) if str(name) not in known]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _durable_content(temporary / name, files), names)
        entries = dict(known) | dict(zip(map(str, names), found, strict=True))
    text = json.dumps({"files": {name: asdict(entries[name]) for name in sorted(entries)}}, indent=1)
    write_durably(temporary / MANIFEST, text, files)
    for part in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        files.fsync(part)
    for name, content in known.items():
        path = temporary / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != content.bytes:
            raise OSError(f"{name}: not there with its {content.bytes} bytes, so nothing is published")
    if confirm is not None:
        confirm()
    replaced = run.checkpoints / f"{_REPLACED}{folder.name}"
    if folder.exists() and not _put_aside(run, folder, files, also_whole=False):
        # One that is damaged, or lacks what this one has. Until the new one has its name, the old one can come back.
        files.remove(replaced)
        files.rename(folder, replaced)
    try:
        files.rename(temporary, folder)
    except OSError:
        if replaced.exists() and not folder.exists():
            files.rename(replaced, folder)
        raise
    files.fsync(run.checkpoints)
    write_durably(run.latest, folder.name, files)
    if replaced.exists():
        files.remove(replaced)
    return folder


def refuse_link(folder: Path) -> None:
    """A checkpoint is never written to, read from or removed through a link.

    Raises:
        OSError: it is one.
    """
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a link: checkpoints are never saved through links; remove it")


def _durable_content(path: Path, files: Files) -> Content:
    files.fsync(path)
    return Content(path.stat().st_size, file_sha256(path))


def changed_on_disk(folder: Path, known: Mapping[str, Content], files: Files) -> str | None:
    """Read files back: the first one that is not what was written, and why; None where all are."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name, found in zip(known, pool.map(lambda name: files.read_back(folder / name), known), strict=True):
            if found != known[name]:
                return f"{name}: what the disk gives back is not what was written"
    return None


@dataclass(frozen=True)
class _Harm:
    """What is wrong with a file; proven, or it could only not be read."""

    text: str
    proven: bool = True

    @classmethod
    def of(cls, name: str, error: OSError) -> _Harm:
        gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return cls(f"{name}: missing" if gone else f"{name}: cannot be read: {error.strerror or error}", gone)


def damage(folder: Path, *, sums: bool = True) -> str | None:
    """What is wrong with a checkpoint by its manifest: the first bad file and why; None where it is whole.

    Args:
        folder: of the checkpoint.
        sums: read every file; otherwise only names and sizes are compared.
    """
    harm = _harm(folder, sums=sums)
    return None if harm is None else harm.text


def _harm(folder: Path, *, sums: bool = True) -> _Harm | None:
    """The first proven harm; where there is none, the first file that cannot be read."""
    try:
        if stat.S_ISLNK(folder.lstat().st_mode):
            return _Harm("it is a link")
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        parsed = {str(name): Content(int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except OSError as error:
        return _Harm.of(MANIFEST, error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _Harm(f"{MANIFEST}: {error}")
    for name in (STATE_FILE, INDEX):
        # What the manifest does not speak of is not proved by it.
        if name not in parsed and os.path.lexists(folder / name):
            return _Harm(f"{name}: not in {MANIFEST}")
    found = [harm for name, content in parsed.items() if (harm := _harm_by_size(folder, name, content)) is not None]
    if sums and not found:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = list(filter(None, pool.map(lambda item: _harm_by_sum(folder, *item), parsed.items())))
    return next((harm for harm in found if harm.proven), found[0] if found else None)


def _harm_by_size(folder: Path, name: str, content: Content) -> _Harm | None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return _Harm(f"{MANIFEST}: {name!r} is not inside the checkpoint")
    try:
        status = (folder / name).lstat()
    except OSError as error:
        return _Harm.of(name, error)
    if not stat.S_ISREG(status.st_mode):
        return _Harm(f"{name}: {'a link' if stat.S_ISLNK(status.st_mode) else 'missing'}")
    return (
        _Harm(f"{name}: {status.st_size} bytes instead of {content.bytes}") if status.st_size != content.bytes else None
    )


def _harm_by_sum(folder: Path, name: str, content: Content) -> _Harm | None:
    try:
        found = file_sha256(folder / name)
    except OSError as error:
        return _Harm.of(name, error)
    return _Harm(f"{name}: its content has changed since it was saved") if found != content.sha256 else None


def published(run: RunFolder) -> list[Path]:
    """The checkpoint folders of a run, oldest step first."""
    if not run.checkpoints.is_dir():
        return []
    steps = {
        step_of(path): path for path in run.checkpoints.iterdir() if step_of(path) is not None and _is_folder(path)
    }
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def _is_folder(path: Path) -> bool:
    """Not through a link; one that cannot be looked at counts: what is wrong with it is said, not passed over."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:
        return False


def linked(run: RunFolder) -> list[Path]:
    """Links that have a checkpoint's name: they are not looked into."""
    if not run.checkpoints.is_dir():
        return []
    return sorted(path for path in run.checkpoints.iterdir() if step_of(path) is not None and _is_link(path))


def newest_whole(folders: Iterable[Path], needed: frozenset[str] = frozenset()) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that its manifest proves, and a line for each newer one that cannot be used.

    Args:
        folders: checkpoints.
        needed: what it must hold: any of model, optimizer.
    """
    notes: list[str] = []
    for folder in sorted(folders, key=lambda path: step_of(path) or 0, reverse=True):
        state = state_or_none(folder)
        if state is not None and not needed <= set(state.contents):
            lacks = ", ".join(sorted(needed - set(state.contents)))
            notes.append(f"{folder}: cannot be gone on from, trainer.checkpoint.save_contents left out {lacks}")
            continue
        found = damage(folder) if state is not None else f"{STATE_FILE} cannot be read"
        if found is None:
            return folder, notes
        notes.append(f"{folder}: damaged, not used ({found})")
    return None, notes


def prune(run: RunFolder, newest: Path, keep: int | None, files: Files | None = None) -> list[Path]:
    """Remove what a checkpoint that was just published makes superfluous; what was removed.

    Call it only where ``newest`` was verified: read back, file by file.

    Kept are the newest ``keep`` ones (None = all) of those that ``save_freq`` made, and ``newest`` itself. Those made
    for recovery or at a stop go, and so do folders of later steps: the run went on from before them because they
    are damaged. One of those that is not proved to be damaged, only could not be read, is renamed and stays. Where
    ``newest`` cannot be gone on from, the newest one that can be stays too.
    """
    files = files or Files()
    step = step_of(newest) or 0
    older = [folder for folder in published(run) if (step_of(folder) or 0) < step]
    surplus: list[Path] = []
    for folder in (folder for folder in published(run) if (step_of(folder) or 0) > step):
        if not _put_aside(run, folder, files, also_whole=True):
            surplus.append(folder)
    newest_state = state_or_none(newest)
    # One whose own state cannot be read is taken for a kept one that nothing can go on from.
    held = {step: Held(newest_state is None or newest_state.kept, newest_state is not None and newest_state.resumable)}
    for folder in older:
        state = state_or_none(folder)
        if state is not None:
            # By names and sizes only, and only where it matters: this is asked at every save.
            whole = held[step].resumable or damage(folder, sums=False) is None
            held[step_of(folder) or 0] = Held(state.kept, state.resumable and whole)
    surplus += [run.step(each) for each in superfluous(held, keep)]
    for folder in surplus:
        # The name goes first: a half-deleted folder must not be found by its number.
        doomed = run.checkpoints / f"{_PRUNED}{folder.name}"
        if doomed.exists() or doomed.is_symlink():
            files.remove(doomed)
        files.rename(folder, doomed)
        files.remove(doomed)
    return surplus


def _put_aside(run: RunFolder, folder: Path, files: Files, *, also_whole: bool) -> bool:
    """Rename a checkpoint that is not proved to be damaged; whether that was done.

    Args:
        run: the run folder.
        folder: the checkpoint.
        files: does the file operations.
        also_whole: also one that can be read by now, and gone on from.
    """
    harm = _harm(folder)
    if harm.proven if harm else not (also_whole and _resumable(folder)):
        return False
    target = run.checkpoints / f"{UNREAD}{folder.name}"
    count = 1
    while os.path.lexists(target):
        count += 1
        target = run.checkpoints / f"{UNREAD}{folder.name}_{count}"
    files.rename(folder, target)
    return True


def _resumable(folder: Path) -> bool:
    state = state_or_none(folder)
    return state is not None and state.resumable


def state_or_none(folder: Path) -> RunState | None:
    """A checkpoint's state; None where it cannot be read."""
    try:
        return read_state(folder)
    except (OSError, ValueError):
        return None


def clear_leftovers(run: RunFolder, files: Files | None = None) -> None:
    """Remove what an interrupted save or pruning left: hidden names of our own only.

    Those of every start: call it only where this start holds the run folder and saves nothing. A checkpoint that was
    set aside for one that never came gets its name back. Of a link only the link goes.
    """
    files = files or Files()
    if not run.checkpoints.is_dir():
        return
    for path in sorted(run.checkpoints.iterdir()):
        if not path.name.startswith((_SAVING, _PRUNED, _REPLACED)):
            continue
        folder = run.checkpoints / path.name.removeprefix(_REPLACED)
        aside = path.name.startswith(_REPLACED) and path.is_dir() and not path.is_symlink()
        if aside and not folder.exists() and not folder.is_symlink():
            files.rename(path, folder)
        else:
            files.remove(path)


def mend_latest(run: RunFolder, folder: Path, files: Files) -> None:
    """Let ``latest`` name a checkpoint of this run that was found whole, where it still names an earlier one.

    A start that died between the two renames of a publication has left it so, and where that was its last save no
    other one follows.
    """
    try:
        named = step_of(run.checkpoints / run.latest.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        named = None
    step = step_of(folder)
    if folder.parent == run.checkpoints and step is not None and (named is None or named < step):
        write_durably(run.latest, folder.name, files)


def drop_temporary(run: RunFolder, token: str, files: Files) -> None:
    """Remove what a start's own save that failed has left; it may hold the run folder or have lost it."""
    for path in sorted(run.checkpoints.glob(f"{_SAVING}{token}_*")):
        files.remove(path)


def mark_final(run: RunFolder, folder: Path, files: Files | None = None) -> None:
    """Let ``final`` link to the last checkpoint."""
    files = files or Files()
    temporary = run.checkpoints / ".final.tmp"
    if temporary.exists() or temporary.is_symlink():
        files.remove(temporary)
    files.link(temporary, folder.name)
    files.rename(temporary, run.final)
    files.fsync(run.checkpoints)
