"""A run's saves, one after the other: what is due, what is in flight, and what follows from one that fails."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from sft_job.checkpoint.background import Background
from sft_job.checkpoint.distributed import (
    is_disk_failure,
    is_host_memory,
    load_tensors,
    on_every_rank,
    on_first_rank,
    trained_tensors,
)
from sft_job.checkpoint.files import Files
from sft_job.checkpoint.folder import clear_leftovers, mark_final, mend_latest, state_or_none
from sft_job.checkpoint.policy import Purpose, SavePolicy, SaveTiming
from sft_job.checkpoint.save import Order, Saved, Writing, already_there, begin, bytes_needed
from sft_job.checkpoint.staging import Staging, global_bytes, local_bytes
from sft_job.checkpoint.state import RunState
from sft_job.contract import ExitCode, RunFolder
from sft_job.errors import JobError, shorten
from sft_job.processes import host_room

HUGGINGFACE = "huggingface"
ADAPTER = "adapter"
_EXPORT = "hf_model"
# A disk may take this long; a rank that is gone shows at once, and one that hangs in the training's own collectives.
_DISK_PATIENCE = timedelta(days=1)
# After an error elsewhere, a save in flight has this long; the supervisor then ends the ranks.
_CLOSE_SECONDS = 15.0
_MEMORY_SHARE = 0.8
_T = TypeVar("_T")
Export = Callable[[Path, Callable[[], None]], str]


@dataclass
class _Flight:
    purpose: Purpose
    order: Order
    work: Background[Saved]
    began: float
    stall: float


class Checkpointer:
    """Saves a run; every method but ``flags`` is a collective call, on the training's thread.

    At most one save is in flight. It works on a copy of the state, on a thread of its own and over a process group of
    its own, so that neither the training nor any timeout of it waits for the disk.

    Args:
        run: the run folder.
        module: the trained module.
        optimizer: its optimizer.
        device: of this rank.
        policy: how and what to save.
        export_name: ``huggingface``, or ``adapter`` where adapters are trained.
        export: writes that into an existing folder and returns the weights' SHA-256 ('' except on rank 0); a
            collective call. Its second argument lets the ranks wait for each other as long as the disk takes.
        on_published: takes each checkpoint's folder when it is whole, on rank 0 and any thread; must return at once.
        confirm: called on rank 0 immediately before a checkpoint gets its name, on any thread; a JobError ends the
            run on all ranks alike, and the checkpoint is not published.
        warn: takes a line for the user, on any thread; None on ranks that have no one to tell.
        files: does the file operations.
        token: of this start, part of the names of its temporary folders; rank 0's holds, None = a new one.
    """

    def __init__(
        self,
        run: RunFolder,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        policy: SavePolicy,
        export_name: str,
        export: Export,
        on_published: Callable[[Path], None] | None = None,
        confirm: Callable[[], None] | None = None,
        warn: Callable[[str], None] | None = None,
        files: Files | None = None,
        token: str | None = None,
    ) -> None:
        self._run = run
        self._module = module
        self._optimizer = optimizer
        self._policy = policy
        self._export_name = export_name
        self._export = export
        self._on_published = on_published
        self._warn = warn
        self._files = files or Files()
        self._asynchronous = policy.asynchronous
        self._group: Any = dist.new_group(backend="gloo", timeout=_DISK_PATIENCE)
        self._confirm = confirm
        agreed: str = self._on_first(lambda: token or uuid.uuid4().hex)
        self._writing = Writing(run, agreed, self._group, policy.keep, confirm, on_published, self._files)
        self._device = device
        self._staging = Staging(device)
        self._flight: _Flight | None = None
        self._measured: dict[tuple[bool, tuple[str, ...]], int] = {}
        self._last_order = time.monotonic()
        self.newest: Path | None = None
        """The newest checkpoint that is known to be published."""
        self._newest_state: RunState | None = None
        self.timing: SaveTiming | None = None
        """Of the last save that has ended."""

    def prepare(self, host_taken: int = 0) -> None:
        """Make the folder, clear what an interrupted save left, and begin to make room in memory.

        Args:
            host_taken: bytes of this node's host memory that training has yet to take for other things.
        """
        self._as_file_work(_make_checkpoint_folder, self._run, self._confirm, self._files)
        trained = [p for p in self._module.parameters() if p.requires_grad]
        if self._asynchronous and not self._fits_memory(trained, host_taken):
            self._asynchronous = False
        if self._asynchronous:
            self._reserve()

    def _reserve(self) -> None:
        trained = [p for p in self._module.parameters() if p.requires_grad]
        self._staging.guard(self._optimizer)
        self._staging.reserve([p for p in trained for _ in range(3)])  # with AdamW's two moments

    @property
    def copies(self) -> bool:
        """Saves are made beside the training, from a copy of the state in host memory; the same on every rank."""
        return self._asynchronous

    def give_up_copy(self) -> None:
        """Give the copy's memory back to the host: saves are waited for. No save may be in flight."""
        self._asynchronous = False
        self._staging.close()

    def take_copy(self) -> None:
        """Make room for the copy again, after ``give_up_copy``."""
        self._asynchronous = True
        self._staging = Staging(self._device)
        self._reserve()

    @property
    def ready(self) -> bool:
        """A save would find its memory made."""
        return self._staging.ready

    def load(self, folder: Path) -> None:
        """Fill module and optimizer from a whole checkpoint.

        Raises:
            JobError: it lacks tensors or does not fit the model (74); the run folder cannot be written (73).
        """
        load_tensors(folder, self._module, self._optimizer, self._group)
        self._as_file_work(mend_latest, self._run, folder, self._files)
        self._published(folder, self._on_first(state_or_none, folder))

    def flags(self) -> tuple[float, float]:
        """This rank's part of two sums over the ranks, for the step's own reduction.

        A recovery checkpoint is due (by rank 0's clock alone); and this rank's save in flight is over.
        """
        if self._flight is not None:
            return 0.0, float(self._flight.work.finished)
        waited = time.monotonic() - self._last_order
        due = dist.get_rank() == 0 and 0 < self._policy.recovery_seconds <= waited
        return float(due), 0.0

    def collect(self, finished: float) -> None:
        """At a step's end: learn how the save in flight went, once it is over on every rank.

        Args:
            finished: the second flag's sum over the ranks.

        Raises:
            JobError: it failed, and ``on_save_failure`` is end (73), or the run folder was lost.
        """
        if self._flight is not None and finished >= dist.get_world_size():
            self._land()

    def owes_kept(self, step: int) -> bool:
        """The newest checkpoint is of this step and was not made to be kept, as one of a stop that holds no export."""
        there = self._newest_state
        return there is not None and there.step == step and not there.kept

    def save(self, state: RunState, purpose: Purpose, *, kept: bool = False) -> RunState:
        """Begin one checkpoint; the last one and that of a stop are waited for.

        Args:
            state: where the run stands.
            purpose: decides what it holds, and what follows from a failure.
            kept: it counts as a kept one, whatever its purpose.

        Returns:
            The state, of an awaited save as it was saved, with the weights' SHA-256 where they were exported.

        Raises:
            JobError: the folder cannot be written (73): this one where it is awaited, else an earlier one.
        """
        began = time.monotonic()
        if self._flight is not None:
            if not purpose.awaited and not self._flight.work.finished:
                self._tell(f"{self._progress(self._flight)}; the next save waits (save less often, or faster disks)")
            self._land(judge=not purpose.awaited)  # an awaited save decides for itself
        self._last_order = time.monotonic()
        # One that takes the place of the newest one, at the same step, has all that is in that one.
        before = self._newest_state if self._newest_state and self._newest_state.step == state.step else None
        held = before.contents if before else ()
        listed = purpose in (Purpose.KEPT, Purpose.LAST)
        kept = kept or listed or (before is not None and before.kept)
        # Between the kept ones a checkpoint holds all that is needed to go on, whatever those hold.
        contents = tuple(n for n in ("model", "optimizer") if n in self._policy.contents or not listed or n in held)
        state = replace(state, kept=kept, contents=contents)
        try:
            order = self._order(state, purpose)
        except Exception as error:  # alike on every rank; what one rank meets alone, the order carries
            self._writing.drop()
            self._judge(purpose, state.step, error)
            return state
        if order is None:
            return state
        if isinstance(order, Saved):
            self._published(order.folder, order.state)
            return order.state
        work = Background(lambda: self._carry_out(order))
        self._flight = _Flight(purpose, order, work, began, time.monotonic() - began)
        if order.staged and not purpose.awaited:
            return state
        saved = self._land()
        return state if saved is None else saved.state

    def stop(self, state: RunState, *, due: bool = False) -> RunState:
        """Leave with a checkpoint of this step: the one in flight, the newest one, or one more.

        Quickly, as schedulers kill what takes its time: nothing is exported, read back or removed any more.

        Args:
            state: where the run stands.
            due: ``save_freq`` asks for a kept one at this step. This is it, unless that would hold an export.
        """
        if self._flight is not None:
            with self._writing.hurried():
                self._land(judge=False)
        there = self._newest_state
        if there is not None and there.step == state.step and there.resumable:
            return state
        return self.save(state, Purpose.STOP, kept=due and _EXPORT not in self._policy.contents)

    def finish(self, step: int) -> None:
        """Let ``final`` point at the checkpoint of the last step: the run is done."""
        self._as_file_work(self._mark_final, self._run.step(step))

    def close(self) -> None:
        """Let a save in flight come to its end, for a while; not a collective call."""
        if self._flight is None or self._flight.work.wait(_CLOSE_SECONDS):
            self._staging.close()

    def _order(self, state: RunState, purpose: Purpose) -> Order | Saved | None:
        """What to write, staged; an export is written at once, for it needs the live model and all ranks.

        None for a recovery checkpoint that there is no memory for.
        """
        exported = purpose is Purpose.LAST or (_EXPORT in self._policy.contents and state.kept)
        (tensors, need), failure = _tried(lambda: self._tensors(state, exported), ({}, 0))
        if exported:
            on_every_rank(_raise, failure, group=self._group)
            there = self._on_first(already_there, self._run, state)
            if there is not None and there.weights_sha256:
                return Saved(self._run.step(state.step), there)  # an earlier start got this far and no further
            self._on_first(begin, self._run, self._writing.temporary(state.step), need, self._files)
            state = replace(state, weights_sha256=self._exported(self._writing.temporary(state.step)))
        live, before, staged = tensors, failure, self._asynchronous
        if staged:
            if failure is None:
                tensors, failure = _tried(lambda: self._staging.stage(live), {})
            if any(shorts := self._each(_shortage, failure)):
                self._staging.drop()
                what = f"step {state.step}: no host memory for a copy of the state ({next(filter(None, shorts))})"
                if purpose is Purpose.RECOVERY:
                    self._tell(f"{what}: no recovery checkpoint this time")
                    return None
                self._tell(f"{what}: training waits until it is saved")
                tensors, failure, staged = live, before, False
        verify = purpose is not Purpose.STOP
        return Order(state, tensors, need, begun=exported, staged=staged, verify=verify, failure=failure)

    def _tensors(self, state: RunState, exported: bool) -> tuple[dict[str, Any], int]:
        """This rank's part, and the bytes that all ranks will write."""
        tensors = trained_tensors(
            self._module,
            self._optimizer,
            with_model="model" in state.contents,
            with_optimizer="optimizer" in state.contents,
        )
        need = bytes_needed(tensors, global_bytes(tensors), dist.get_world_size())
        if exported:
            need += global_bytes([p for p in self._module.parameters() if p.requires_grad])
        return tensors, max(need, self._measured.get((exported, state.contents), 0))

    def _exported(self, temporary: Path) -> str:
        self._on_first(self._files.mkdir, temporary / self._export_name)

        def meet() -> None:
            dist.barrier(group=self._group)

        return on_every_rank(self._export, temporary / self._export_name, meet, group=self._group)[0]

    def _carry_out(self, order: Order) -> Saved:
        def ready() -> None:
            _raise(order.failure)
            if order.staged:
                self._staging.wait()

        return self._writing.carry_out(order, ready)

    def _land(self, *, judge: bool = True) -> Saved | None:
        """Wait for the save in flight; None where it failed and the run goes on."""
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        waited = time.monotonic()
        step, saved = flight.order.state.step, None
        try:
            saved = flight.work.result(lambda _: self._tell(self._progress(flight)))
        except Exception as error:
            self._judge(flight.purpose, step, error, may_end=judge)
        else:
            self._published(saved.folder, saved.state)
            if saved.bytes:
                self._measured[bool(saved.state.weights_sha256), saved.state.contents] = saved.bytes
            if saved.note:
                self._tell(saved.note)
        finally:
            self._staging.release()
            stall = flight.stall + time.monotonic() - waited
            self.timing = SaveTiming(stall, flight.work.ended - flight.began, saved.bytes if saved else 0)
        return saved

    def _judge(self, purpose: Purpose, step: int, error: Exception, *, may_end: bool = True) -> None:
        """What follows from a save that failed: an end, or a warning; the same on every rank."""
        memory = is_host_memory(error)
        if isinstance(error, JobError) or not (memory or is_disk_failure(error)):
            raise error
        fix = "more host memory, or fewer ranks on this node" if memory else "free space"
        text = (
            f"cannot save step {step} in {self._run.checkpoints}: {' '.join(str(error).split())[:200]}\n    "
            f"fix: {fix}; the run goes on from {self.newest.name if self.newest else 'its beginning'}"
        )
        if purpose.awaited or (may_end and purpose is Purpose.KEPT and self._policy.end_on_failure):
            code = ExitCode.OUT_OF_MEMORY if memory else ExitCode.CANNOT_CREATE
            raise JobError(code, f"out of host memory: {text}" if memory else text) from error
        self._tell(f"{text} (training goes on, the next save tries again)")

    def _published(self, folder: Path, state: RunState | None) -> None:
        self.newest, self._newest_state = folder, state

    def _progress(self, flight: _Flight) -> str:
        seconds = max(1e-3, time.monotonic() - flight.began)
        done, total = self._writing.bytes_written, local_bytes(flight.order.tensors)
        return (
            f"global_step_{flight.order.state.step} is still being written: {done / 2**30:.2f} of {total / 2**30:.2f} "
            f"GiB on this rank in {seconds:.0f} s, {done / 1e6 / seconds:.0f} MB/s"
        )

    def _fits_memory(self, trained: list[torch.nn.Parameter], taken: int) -> bool:
        """Whether every node has room for a copy of the state; otherwise saves are synchronous.

        Where parameters live in host memory (CPU offload, or no GPU), training has yet to take its own part of it:
        gradients, and AdamW's two moments where no step was made.
        """
        on_host = [p for p in trained if p.device.type == "cpu"]
        to_come = local_bytes([p for p in on_host if p.grad is None])
        to_come += 2 * local_bytes([p for p in on_host if p not in self._optimizer.state])
        need = (3 * local_bytes(trained) + to_come) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = host_room()
        room = None if room is None else max(0, room - taken)
        short = "" if room is None or need <= _MEMORY_SHARE * room else f"{need / 2**30:.1f} of {room / 2**30:.1f} GiB"
        shorts = [each for each in on_every_rank(lambda: short, group=self._group) if each]
        if shorts:
            what = "a copy of the state, and what training has yet to take,"
            self._tell(f"trainer.async_save: {what} would be {shorts[0]} of host memory: not used")
        return not shorts

    def _mark_final(self, folder: Path) -> None:
        mark_final(self._run, folder, self._files)
        if self._on_published is not None:
            self._on_published(folder)

    def _tell(self, text: str) -> None:
        if self._warn is not None:
            self._warn(text)

    def _on_first(self, action: Callable[..., Any], *arguments: object) -> Any:
        return on_first_rank(action, *arguments, group=self._group)

    def _each(self, action: Callable[..., _T], *arguments: object) -> list[_T]:
        return on_every_rank(action, *arguments, group=self._group)

    def _as_file_work(self, action: Callable[..., Any], *arguments: object) -> Any:
        try:
            return self._on_first(action, *arguments)
        except OSError as error:
            raise JobError(ExitCode.CANNOT_CREATE, f"{self._run.checkpoints}: {error}") from error


def _tried(make: Callable[[], _T], otherwise: _T) -> tuple[_T, Exception | None]:
    """What this rank made, or what it met: the others must hear of it before anything else is said."""
    try:
        return make(), None
    except Exception as error:
        return otherwise, error


def _shortage(error: Exception | None) -> str:
    """What says that host memory ran out; '' for anything else."""
    return shorten(" ".join(str(error).split()), 200) or "MemoryError" if error and is_host_memory(error) else ""


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _make_checkpoint_folder(run: RunFolder, confirm: Callable[[], None] | None, files: Files) -> None:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    if confirm is not None:
        confirm()  # in a run folder that was lost, what lies there is the new holder's
    clear_leftovers(run, files)
    probe = run.checkpoints / f".probe_{os.getpid()}"
    probe.write_text("", encoding="utf-8")
    probe.unlink()
