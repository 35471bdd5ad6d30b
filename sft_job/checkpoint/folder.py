"""Checkpoints as folders: published by rename, named by ``latest``, pruned when old.

Torch-free. A folder named ``global_step_N`` is whole or it is damaged: a half-written one never gets that name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sft_job.checkpoint.files import Content, Files, write_durably
from sft_job.checkpoint.manifest import damage, harm_of, write_manifest
from sft_job.checkpoint.retention import Held, superfluous
from sft_job.checkpoint.state import STATE_FILE, RunState, read_state
from sft_job.contract import RunFolder, step_of

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
    write_manifest(temporary, known, files)
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
    harm = harm_of(folder)
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
