"""One save, from the ranks' shards to a published folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sft_job.checkpoint.distributed import on_first_rank, save_tensors
from sft_job.checkpoint.folder import clear_leftovers, mark_final, prune, publish, temporary_folder
from sft_job.checkpoint.state import STATE_FILE, RunState
from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError

HUGGINGFACE = "huggingface"


class Checkpointer:
    """Saves a run; every method is a collective call.

    Args:
        run: the run folder.
        module: the trained module.
        optimizer: its optimizer.
        contents: ``trainer.checkpoint.save_contents``.
        keep: ``trainer.max_ckpt_to_keep``.
        export: writes a Hugging Face folder into an existing folder and returns the weights' SHA-256 ('' except on
            rank 0); a collective call.
    """

    def __init__(
        self,
        run: RunFolder,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        contents: Sequence[str],
        keep: int | None,
        export: Callable[[Path], str],
    ) -> None:
        self._run = run
        self._module = module
        self._optimizer = optimizer
        self._contents = frozenset(contents)
        self._keep = keep
        self._export = export
        self.newest: Path | None = None
        """The checkpoint that was saved last."""

    def prepare(self) -> None:
        """Make the folder and clear what an interrupted save left."""
        self._as_file_work(_make_checkpoint_folder, self._run)

    def save(self, state: RunState, *, last: bool) -> str:
        """Write and publish one checkpoint, then remove those that it makes superfluous.

        Args:
            state: where the run stands.
            last: the run is done: a Hugging Face folder is written and ``final`` points at this checkpoint.

        Returns:
            The weights' SHA-256 where a Hugging Face folder was written, else ''; the same on every rank.

        Raises:
            JobError: the folder cannot be written (73).
        """
        temporary = temporary_folder(self._run, state.step)
        self._as_file_work(_make_empty, temporary)
        digest = ""
        try:
            save_tensors(
                temporary,
                self._module,
                self._optimizer,
                # A stop in between saves all that is needed to go on, whatever the kept checkpoints hold.
                with_model="model" in self._contents or not state.kept,
                with_optimizer="optimizer" in self._contents or not state.kept,
            )
            if last or "hf_model" in self._contents:
                self._as_file_work(_make_empty, temporary / HUGGINGFACE)
                digest = self._export(temporary / HUGGINGFACE)
            dist.barrier()  # every rank's files are there before they are counted
            self.newest = self._as_file_work(self._publish, state, last)
        except (OSError, RuntimeError) as error:
            raise JobError(ExitCode.CANNOT_CREATE, f"cannot save step {state.step}: {error}") from error
        box: list[str] = [digest]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _publish(self, state: RunState, last: bool) -> Path:
        (temporary_folder(self._run, state.step) / STATE_FILE).write_text(state.to_json(), encoding="utf-8")
        folder = publish(self._run, state.step)
        if last:
            mark_final(self._run, folder)
        prune(self._run, self._keep)
        return folder

    def _as_file_work(self, action: Callable[..., Path | None], *arguments: object) -> Path | None:
        try:
            return on_first_rank(action, *arguments)
        except OSError as error:
            raise JobError(ExitCode.CANNOT_CREATE, f"{self._run.checkpoints}: {error}") from error


def _make_checkpoint_folder(run: RunFolder) -> None:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    clear_leftovers(run)
    probe = run.checkpoints / f".probe_{os.getpid()}"
    probe.write_text("", encoding="utf-8")
    probe.unlink()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
