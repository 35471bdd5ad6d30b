"""What one save does to the disk, on whatever thread: shards, verification, publication, retention."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft_job.checkpoint.distributed import is_host_memory, on_every_rank, on_first_rank, save_tensors
from sft_job.checkpoint.files import Content, Files
from sft_job.checkpoint.folder import drop_temporary, prune, publish, refuse_link, state_or_none, temporary_folder
from sft_job.checkpoint.manifest import changed_on_disk, damage, files_below
from sft_job.checkpoint.shards import ShardWriter
from sft_job.checkpoint.staging import local_bytes, tensors_of
from sft_job.checkpoint.state import STATE_FILE, RunState
from sft_job.contract import RunFolder

# What torch puts around each tensor, at the most.
_HEADER_BYTES = 2048


@dataclass(frozen=True)
class Order:
    """What to save.

    Attributes:
        state: where the run stands; as it shall be in state.json.
        tensors: this rank's part; nobody changes them until the save is over.
        need: bytes that all ranks will write.
        begun: the temporary folder is there already, with the export in it.
        staged: the tensors are copies; others must not change before the save is over.
        verify: read everything back before it is published, and then remove what it makes superfluous.
        failure: what this rank met while it put the order together; no rank then carries it out.
    """

    state: RunState
    tensors: dict[str, Any]
    need: int
    begun: bool
    staged: bool
    verify: bool
    failure: Exception | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is published.

    Attributes:
        folder: where.
        state: as it was saved.
        bytes: of its files; 0 where it was there before.
        note: what went wrong beside it; '' = nothing.
    """

    folder: Path
    state: RunState
    bytes: int = 0
    note: str = ""


class Writing:
    """Carries out orders.

    Args:
        run: the run folder.
        token: of this start; the same on every rank.
        group: gloo, with a timeout beyond any disk's patience; nothing else may use it meanwhile.
        keep: kept checkpoints; None = all.
        confirm: called on rank 0 immediately before a checkpoint gets its name.
        announce: takes each checkpoint's folder when it is whole, on rank 0; must return at once.
        files: does the file operations.
    """

    def __init__(
        self,
        run: RunFolder,
        token: str,
        group: dist.ProcessGroup,
        keep: int | None,
        confirm: Callable[[], None] | None,
        announce: Callable[[Path], None] | None,
        files: Files,
    ) -> None:
        self._run = run
        self._token = token
        self._group = group
        self._keep = keep
        self._confirm = confirm
        self._announce = announce
        self._files = files
        self._writer: ShardWriter | None = None
        self._hurry = threading.Event()

    @property
    def bytes_written(self) -> int:
        """By this rank, of the present order."""
        return 0 if self._writer is None else self._writer.bytes_written

    def carry_out(self, order: Order, ready: Callable[[], None]) -> Saved:
        """Write and publish (a collective call over the group, on any thread).

        Args:
            order: what to save.
            ready: waits until this rank's tensors can be read; what it raises on one rank ends the save on all.

        Raises:
            Exception: the first rank's, on all ranks alike; the temporary folder is gone, older checkpoints are as
                they were.
        """
        try:
            on_every_rank(ready, group=self._group)
            if not order.begun:
                there = on_first_rank(self._begin_or_find, order, group=self._group)
                if there is not None:
                    return Saved(self._run.step(order.state.step), there)
            known, verified = self._write(order)
            return on_first_rank(self._publish, order, known, verified, group=self._group)
        except Exception:
            self.drop()
            raise
        finally:
            self._writer = None

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """Inside, the order in flight is no longer read back where it has not begun to be; then it removes nothing."""
        self._hurry.set()
        try:
            yield
        finally:
            self._hurry.clear()

    def drop(self) -> None:
        """Remove what a save that failed has left, on rank 0; every rank has stopped writing."""
        if dist.get_rank() == 0:
            with suppress(OSError):
                drop_temporary(self._run, self._token, self._files)

    def temporary(self, step: int) -> Path:
        """Where the checkpoint of a step is written."""
        return temporary_folder(self._run, step, self._token)

    def _begin_or_find(self, order: Order) -> RunState | None:
        there = already_there(self._run, order.state)
        if there is None:
            begin(self._run, self.temporary(order.state.step), order.need, self._files)
        return there

    def _write(self, order: Order) -> tuple[dict[str, Content], bool]:
        """Every rank's shards; their content on every rank, and whether all of it was read back."""
        folder = self.temporary(order.state.step)
        local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        threads = max(1, len(os.sched_getaffinity(0)) // local)
        self._writer = ShardWriter(folder, local_bytes(order.tensors), threads, self._files)
        try:
            mine = save_tensors(order.tensors, self._writer, self._group)
        except Exception:
            # torch's writer turns a full disk into an error of its own; the first cause says more.
            for cause in filter(None, on_every_rank(self._cause, group=self._group)):
                raise cause from None
            raise
        found = on_every_rank(self._checked, folder, mine, order.verify, group=self._group)
        known = {name: content for part, _ in found for name, content in part.items()}
        return known, all(verified for _, verified in found)

    def _cause(self) -> Exception | None:
        """What this rank's files met, as an error that can travel."""
        error = self._writer.error if self._writer is not None else None
        if error is None:
            return None
        return MemoryError(str(error)) if is_host_memory(error) else OSError(str(error))

    def _checked(self, folder: Path, mine: dict[str, Content], verify: bool) -> tuple[dict[str, Content], bool]:
        verify = verify and not self._hurry.is_set()
        changed = changed_on_disk(folder, mine, self._files) if verify else None
        if changed is not None:
            raise OSError(changed)
        return mine, verify

    def _publish(self, order: Order, known: dict[str, Content], verified: bool) -> Saved:
        run, state = self._run, order.state
        temporary = self.temporary(state.step)
        with self._files.writing(temporary / STATE_FILE) as file:
            file.write(state.to_json().encode("utf-8"))
        folder = publish(run, state.step, temporary, known, self._confirm, self._files)
        note = ""
        if verified:
            # A save on the way out deletes nothing: it is not read back, for a scheduler will not wait for that.
            try:
                prune(run, folder, self._keep, self._files)
            except OSError as error:
                note = f"old checkpoints could not be removed: {error}"
        if self._announce is not None:
            self._announce(folder)
        total = sum((folder / name).stat().st_size for name in files_below(folder))
        return Saved(folder, state, total, note)


def already_there(run: RunFolder, wanted: RunState) -> RunState | None:
    """The state of a step's checkpoint if there is a whole one that holds all that is wanted."""
    folder = run.step(wanted.step)
    refuse_link(folder)
    there = state_or_none(folder)
    holds = there is not None and set(wanted.contents) <= set(there.contents) and (there.kept or not wanted.kept)
    return there if holds and damage(folder) is None else None


def begin(run: RunFolder, temporary: Path, need: int, files: Files) -> None:
    """Make an empty temporary folder, on rank 0.

    Args:
        run: the run folder.
        temporary: the folder.
        need: bytes that will be written.
        files: does the file operations.

    Raises:
        OSError: there is not enough space; nothing was written.
    """
    if temporary.exists() or temporary.is_symlink():
        files.remove(temporary)
    free = files.free_bytes(run.checkpoints)
    if need > free:
        raise OSError(errno.ENOSPC, f"it needs {need / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free")
    files.mkdir(temporary)


def bytes_needed(tensors: dict[str, Any], total: int, ranks: int) -> int:
    """Bytes on disk of a state of ``total`` bytes, headers included."""
    return total + len(tensors_of(tensors)) * ranks * _HEADER_BYTES
