"""Checkpoints as folders: published by rename, named by ``latest``, proved by a manifest, pruned when old.

Torch-free. A folder named ``global_step_N`` is whole or it is damaged: a half-written one never gets that name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sft_job.checkpoint.state import STATE_FILE, RunState, read_state
from sft_job.contract import RunFolder, step_of

MANIFEST = "manifest.json"
_SAVING, _PRUNED, _REPLACED = ".saving_", ".pruned_", ".replaced_"


def temporary_folder(run: RunFolder, step: int) -> Path:
    """Where the checkpoint of a step is written before it is published."""
    return run.checkpoints / f"{_SAVING}{run.step(step).name}"


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file at once: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, relative to it, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.relative_to(folder) for path in found if path != folder / MANIFEST)


def publish(run: RunFolder, step: int) -> Path:
    """Give a finished temporary folder its name, then let ``latest`` point at it.

    Writes the manifest, makes every file durable, renames, and only then moves the pointer: whatever instant the
    process dies at, ``latest`` names a whole checkpoint.
    """
    temporary, folder = temporary_folder(run, step), run.step(step)
    names = files_below(temporary)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        entries = dict(zip(map(str, names), pool.map(lambda name: _entry(temporary / name), names), strict=True))
    write_durably(temporary / MANIFEST, json.dumps({"files": entries}, indent=1))
    for part in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        fsync_path(part)
    if folder.exists():
        # One that is damaged, or lacks what this one has. Until the new one has its name, the old one can come back.
        replaced = run.checkpoints / f"{_REPLACED}{folder.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    temporary.rename(folder)
    fsync_path(run.checkpoints)
    write_durably(run.latest, folder.name)
    shutil.rmtree(run.checkpoints / f"{_REPLACED}{folder.name}", ignore_errors=True)
    return folder


def _entry(path: Path) -> dict[str, int | str]:
    fsync_path(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest: the first bad file and why; None where it is whole."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name}: missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name}: {path.stat().st_size} bytes instead of {entry['bytes']}"
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        sums = pool.map(lambda name: file_sha256(folder / name), entries)
        for (name, entry), found in zip(entries.items(), sums, strict=True):
            if found != entry["sha256"]:
                return f"{name}: its content has changed since it was saved"
    return None


def published(run: RunFolder) -> list[Path]:
    """The checkpoint folders of a run, oldest step first."""
    if not run.checkpoints.is_dir():
        return []
    steps = {step_of(path): path for path in run.checkpoints.iterdir() if path.is_dir() and not path.is_symlink()}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


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


def prune(run: RunFolder, newest: Path, keep: int | None) -> list[Path]:
    """Remove what a checkpoint that was just published makes superfluous; what was removed.

    Kept are the newest ``keep`` ones (None = all) of those that ``save_freq`` made, and ``newest`` itself. Those made
    on the way out, at a stop, go, and so do folders of later steps: the run went on from before them because they
    are damaged.
    """
    step = step_of(newest) or 0
    older = [folder for folder in published(run) if (step_of(folder) or 0) < step]
    surplus = [folder for folder in published(run) if (step_of(folder) or 0) > step]
    states = {folder: state_or_none(folder) for folder in older}
    surplus += [folder for folder, state in states.items() if state is not None and not state.kept]
    if keep is not None:
        kept = [folder for folder, state in states.items() if state is not None and state.kept]
        counts = (state := state_or_none(newest)) is None or state.kept
        surplus += kept[: max(0, len(kept) - max(0, keep - counts))]
    for folder in surplus:
        # The name goes first: a half-deleted folder must not be found by its number.
        doomed = run.checkpoints / f"{_PRUNED}{folder.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return surplus


def state_or_none(folder: Path) -> RunState | None:
    """A checkpoint's state; None where it cannot be read."""
    try:
        return read_state(folder)
    except (OSError, ValueError):
        return None


def clear_leftovers(run: RunFolder) -> None:
    """Remove what an interrupted save or pruning left: hidden folders of our own names only.

    A checkpoint that was set aside for one that never came gets its name back.
    """
    if not run.checkpoints.is_dir():
        return
    ours = [path for path in run.checkpoints.iterdir() if path.is_dir() and not path.is_symlink()]
    for path in ours:
        name = path.name.removeprefix(_REPLACED)
        if path.name.startswith(_REPLACED) and not (run.checkpoints / name).exists():
            path.rename(run.checkpoints / name)
        elif path.name.startswith((_SAVING, _PRUNED, _REPLACED)):
            shutil.rmtree(path, ignore_errors=True)


def mark_final(run: RunFolder, folder: Path) -> None:
    """Let ``final`` link to the last checkpoint."""
    temporary = run.checkpoints / ".final.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    temporary.replace(run.final)
    fsync_path(run.checkpoints)
