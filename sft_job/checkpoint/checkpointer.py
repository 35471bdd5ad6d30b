"""One save, from the ranks' shards to a published folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from sft_job.checkpoint.distributed import is_disk_failure, on_first_rank, save_tensors
from sft_job.checkpoint.folder import (
    clear_leftovers,
    damage,
    mark_final,
    prune,
    publish,
    state_or_none,
    temporary_folder,
)
from sft_job.checkpoint.state import STATE_FILE, RunState
from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError

Result = TypeVar("Result")
HUGGINGFACE = "huggingface"
ADAPTER = "adapter"


class Checkpointer:
    """Saves a run; every method is a collective call.

    Args:
        run: the run folder.
        module: the trained module.
        optimizer: its optimizer.
        contents: ``trainer.checkpoint.save_contents``.
        keep: ``trainer.max_ckpt_to_keep``.
        export_name: ``huggingface``, or ``adapter`` where adapters are trained.
        export: writes that into an existing folder and returns the weights' SHA-256 ('' except on rank 0); a
            collective call.
        on_published: takes each checkpoint's folder when it is whole, on rank 0; must return at once.
    """

    def __init__(
        self,
        run: RunFolder,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        contents: Sequence[str],
        keep: int | None,
        export_name: str,
        export: Callable[[Path], str],
        on_published: Callable[[Path], None] | None = None,
    ) -> None:
        self._run = run
        self._module = module
        self._optimizer = optimizer
        self._contents = frozenset(contents)
        self._keep = keep
        self._export_name = export_name
        self._export = export
        self._on_published = on_published
        self.newest: Path | None = None
        """The checkpoint that was saved last."""

    def prepare(self) -> None:
        """Make the folder and clear what an interrupted save left."""
        self._as_file_work(_make_checkpoint_folder, self._run)

    def save(self, state: RunState, *, last: bool) -> RunState:
        """Write and publish one checkpoint, then remove those that it makes superfluous.

        Args:
            state: where the run stands.
            last: the run is at its end: the checkpoint holds the export.

        Returns:
            The state as it was saved, with the weights' SHA-256 where they were exported; the same on every rank.

        Raises:
            JobError: the folder cannot be written (73).
        """
        there = self._as_file_work(_whole_state, self._run, state.step)
        if there is not None and (there.weights_sha256 or not last):
            # An earlier start got this far and no further.
            self.newest = self._run.step(state.step)
            return there
        # A stop in between saves all that is needed to go on, whatever the kept checkpoints hold.
        contents = tuple(name for name in ("model", "optimizer") if name in self._contents or not state.kept)
        exported = last or ("hf_model" in self._contents and state.kept)
        temporary = temporary_folder(self._run, state.step)
        self._as_file_work(_make_empty, temporary)
        try:
            save_tensors(
                temporary,
                self._module,
                self._optimizer,
                with_model="model" in contents,
                with_optimizer="optimizer" in contents,
            )
            digest = self._exported(temporary) if exported else ""
            dist.barrier()  # every rank's files are there before they are counted
        except Exception as error:
            if is_disk_failure(error):
                raise self._cannot_save(state.step, error) from error
            raise
        saved = replace(state, contents=contents, weights_sha256=digest)
        self.newest = self._as_file_work(self._publish, saved)
        return saved

    def finish(self, step: int) -> None:
        """Let ``final`` point at the checkpoint of the last step: the run is done."""
        self._as_file_work(self._mark_final, self._run.step(step))

    def _mark_final(self, folder: Path) -> None:
        mark_final(self._run, folder)
        self._announce(folder)

    def _announce(self, folder: Path) -> None:
        if self._on_published is not None:
            self._on_published(folder)

    def _exported(self, temporary: Path) -> str:
        self._as_file_work(_make_empty, temporary / self._export_name)
        box: list[str] = [self._export(temporary / self._export_name)]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _publish(self, state: RunState) -> Path:
        (temporary_folder(self._run, state.step) / STATE_FILE).write_text(state.to_json(), encoding="utf-8")
        folder = publish(self._run, state.step)
        prune(self._run, folder, self._keep)
        self._announce(folder)
        return folder

    def _cannot_save(self, step: int, error: Exception) -> JobError:
        return JobError(
            ExitCode.CANNOT_CREATE,
            f"cannot save step {step} in {self._run.checkpoints}: {' '.join(str(error).split())[:200]}\n    fix: free "
            f"space; the run goes on from {self.newest.name if self.newest else 'its beginning'}",
        )

    def _as_file_work(self, action: Callable[..., Result], *arguments: object) -> Result:
        try:
            return on_first_rank(action, *arguments)
        except OSError as error:
            raise JobError(ExitCode.CANNOT_CREATE, f"{self._run.checkpoints}: {error}") from error


def _whole_state(run: RunFolder, step: int) -> RunState | None:
    """The state of a step's checkpoint if there is a whole one."""
    folder = run.step(step)
    return state_or_none(folder) if folder.is_dir() and damage(folder) is None else None


def _make_checkpoint_folder(run: RunFolder) -> None:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    clear_leftovers(run)
    probe = run.checkpoints / f".probe_{os.getpid()}"
    probe.write_text("", encoding="utf-8")
    probe.unlink()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
